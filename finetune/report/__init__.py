"""`report.html`: one page a person opens. Did it get better, what did it cost, may I use it, how do I serve it."""

from __future__ import annotations

from finetune.rundir import RunDir, write_text


def report(run_dir: RunDir) -> None:
    """Writes `report.html` into the run folder from what its stages have left; it means that all of them are done.

    Raises RunError RUN-002 where one is not: `report page` shows such a run, on a page beside it.
    """
    from rich.console import Console

    from finetune.report.gather import gather, left_by
    from finetune.report.render import page

    for stage, path in left_by(run_dir).items():
        run_dir.require(path, stage)
    write_text(run_dir.report, page(gather(run_dir)))
    Console().print(f"Report: {run_dir.report}", markup=False, highlight=False, soft_wrap=True)
