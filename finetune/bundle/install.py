"""INSTALL.txt of a bundle: the commands of the site without a network, word for word."""

from __future__ import annotations

HEAD = """\
{title}
Packed {when} with finetune {version}, for Python {python} on {platform}.

Every line that begins with "$ " is a command, typed in this folder (of a tar file: tar -xf FILE.tar first).
Nothing below needs a network. Nothing is written into this folder, so that it can be checked again at any time.

1. Is it what was packed? Compare the hash of bundle.json with the one that was printed when it was packed.

$ sha256sum bundle.json
$ sha256sum --quiet -c SHA256SUMS
"""

WHEELS = """
2. The program, in an environment of its own beside this folder. Every file is checked against its hash again.

$ python3 -m venv ../finetune-venv
{commands}

3. The same check by the program, which also finds what was added.

$ ../finetune-venv/bin/python -m finetune bundle verify .
"""

NO_WHEELS = """
2. The program is not in this bundle. Install finetune {version} by its README, and let FINETUNE_PYTHON be its Python.

3. The same check by the program, which also finds what was added.

$ ${{FINETUNE_PYTHON}} -m finetune bundle verify .
"""

TAIL = """
4. A folder to work in, beside this one. Files are linked and not copied: both must lie on one disk (else: cp -r).

$ mkdir -p ../finetune-work
$ cp -rl {parts} ../finetune-work/

5. What it needs and takes, then the job.

$ cd ../finetune-work && {python} -m finetune plan --config-dir recipes {words}
$ cd ../finetune-work && {python} -m finetune --config-dir recipes {words}
"""


def install_text(facts: dict[str, str], parts: list[str], words: list[str], locks: list[str]) -> str:
    """The text. `parts`: folders that a job reads; `locks`: files in the order of their installation, or none."""
    python = "../finetune-venv/bin/python" if locks else "${FINETUNE_PYTHON}"
    pip = "$ ../finetune-venv/bin/python -m pip install --no-index --find-links wheels --no-deps --no-build-isolation"
    commands = "\n".join(f"{pip} --require-hashes -r {lock}" for lock in locks)
    middle = WHEELS.format(commands=commands) if locks else NO_WHEELS.format(version=facts["version"])
    tail = TAIL.format(parts=" ".join(parts), python=python, words=" ".join(words))
    return HEAD.format(**facts) + middle + tail
