"""What scripts/egress_check.sh does: runs a job where nothing can leave, and writes what it tried (egress.json).

Three proofs, none of which relies on another:
  guard      an audit hook in every Python process that imports finetune: notes and refuses (finetune/egress.py)
  namespace  no interface but loopback, so nothing can leave; the kernel counts what had no route, native code included
  strace     every system call on sockets, of every process
Each is first shown an attempt on purpose. One that does not see it, or that this machine does not permit, is not given,
and egress.json says so.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import OFFLINE, __version__, egress
from finetune.record import git_commit
from finetune.rundir import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "recipe=legal_quickstart"
CI_VARIABLES = ("CI", "GITHUB_ACTIONS", "GITLAB_CI", "BUILD_NUMBER", "TF_BUILD")
"""TRL does not call out where CI is set: a check that leaves it would prove nothing."""
RESOLVERS = re.compile(r"systemd/resolve|io\.systemd\.Resolve")
"""Sockets of this machine behind which somebody else asks the network for a name."""
UNPROVEN = {
    "guard": "no guard in the Python processes",
    "namespace": "no namespace without routes: something could have left",
    "strace": "system calls were not traced",
}
# 192.0.2.1 is for documentation (RFC 5737) and belongs to nobody; to connect a datagram socket sends nothing.
CONTROL = """
import ctypes, socket, struct, finetune
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))
except OSError:
    pass
libc = ctypes.CDLL(None)
libc.connect(libc.socket(2, 2, 0), struct.pack("=H", 2) + struct.pack("!H", 9) + bytes([192, 0, 2, 1]) + bytes(8), 16)
"""


def main(words: list[str]) -> int:
    """Carries out the check. Returns the exit code."""
    if words[:1] == ["--inside"]:
        return inside(Path(words[1]))
    out = Path("egress.json")
    if words[:1] == ["--out"]:
        out, words = Path(words[1]), words[2:]
    with tempfile.TemporaryDirectory(prefix="egress-") as folder:
        scratch = Path(folder)
        if words[:1] == ["--"]:
            command, job = words[1:], ""
        else:
            words = words if any(word.startswith("recipe=") for word in words) else [DEFAULT, *words]
            say("fetching what the job needs, outside")
            cache = fetch(words)
            command, job = whole_job(words, cache, scratch), scratch.name
        found = check(command, scratch)
        if job:
            found["stages"] = stages(scratch)
        found["verdict"], code = verdict(found, whole=bool(job))
        text = json.dumps(found).replace(str(scratch), "$SCRATCH").replace(str(ROOT), "$CHECKOUT")
        write_json(out.absolute(), json.loads(text.replace(sys.executable, "python")))
    tell(found, out)
    return code


def fetch(words: list[str]) -> Path:
    """Brings base, rows and converter into the cache, with the network. Returns the cache."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "fetch", *words, "network=true"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        print(done.stdout, end="")
        raise SystemExit(2)
    return Path(re.findall(r"^cache: (.*)$", done.stdout, re.MULTILINE)[0])


def whole_job(words: list[str], cache: Path, scratch: Path) -> list[str]:
    """The command line of the job: no network, a run folder of its own, and no rows that were prepared before."""
    own = scratch / "cache"
    own.mkdir()
    for name in ("bases", "extracted", "hub", "packages"):
        if (cache / name).is_dir():
            (own / name).symlink_to(cache / name)
    places = [f"cache_dir={own}", f"runs_dir={scratch / 'runs'}"]
    return [sys.executable, "-m", "finetune", *words, *places, "network=false"]


def check(command: list[str], scratch: Path) -> dict[str, Any]:
    """Runs the command with all the proofs that this machine permits. Returns what egress.json holds."""
    unshare = unshare_words()
    strace = strace_words()
    names = [*CI_VARIABLES, *OFFLINE]
    environment = {k: v for k, v in os.environ.items() if k not in names}
    write_json(scratch / "job.json", {"command": command, "strace": strace, "namespaced": bool(unshare)})
    say(f"running inside: namespace {'yes' if unshare else 'NO'}, strace {'yes' if strace else 'NO'}")
    started = time.time()
    here = [sys.executable, str(Path(__file__).resolve()), "--inside", str(scratch)]
    subprocess.run([*unshare, *here], env=environment, check=False)
    if not (scratch / "inside.json").is_file():
        raise SystemExit("egress check: the process inside ended without a result (see above)")
    seen = read_json(scratch / "inside.json")
    return {
        "what": "attempts to reach anything but this machine",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "command": command,
        "exit_code": seen["exit_code"],
        "removed_from_environment": [name for name in names if name in given_names()],
        "proofs": seen["proofs"],
        "not_proven": [UNPROVEN[name] for name, proof in seen["proofs"].items() if not proof["given"]],
        "attempts": seen["attempts"],
        "versions": versions(),
    }


def given_names() -> set[str]:
    """Names in the environment that this process was started with: since then finetune has set its own."""
    entries = Path("/proc/self/environ")
    return {entry.partition("=")[0] for entry in entries.read_text().split("\0")} if entries.is_file() else set()


def unshare_words() -> list[str]:
    """The words in front of a command that give it a network of its own; empty where that is not permitted."""
    program = shutil.which("unshare")
    for options in (["-n"], ["-r", "-n"]):
        if program and subprocess.run([program, *options, "true"], capture_output=True).returncode == 0:
            return [program, *options]
    return []


def strace_words() -> list[str]:
    """The words in front of a command that trace it and its children; empty without a strace that works here."""
    program = shutil.which("strace")
    for options in (["--seccomp-bpf"], []):  # with it, only these calls are stopped at
        words = [program or "", "-f", "-q", *options, "-e", "trace=network"]
        if program and subprocess.run([*words, "-o", os.devnull, "true"], capture_output=True).returncode == 0:
            return words
    return []


def inside(scratch: Path) -> int:
    """The part in the namespace: shows each proof an attempt on purpose, then runs the command."""
    job = read_json(scratch / "job.json")
    if job["namespaced"]:
        loopback_up()
    interfaces = sorted(name for _, name in socket.if_nameindex())
    control, _ = observed([sys.executable, "-c", CONTROL], job, scratch / "control", quiet=True)
    found, code = observed(job["command"], job, scratch / "job")
    alone = job["namespaced"] and interfaces == ["lo"] and unreachable()
    proofs = {
        "guard": {
            "given": bool(control["guard"]) and found["guarded"] > 0,
            "control_seen": bool(control["guard"]),
            "processes": found["guarded"],
        },
        "namespace": {
            "given": alone and control["no_route"] > 0,
            "control_seen": control["no_route"] > 0,
            "interfaces": interfaces if job["namespaced"] else None,
            "without_route": found["no_route"] if alone else None,
        },
        "strace": {
            "given": bool(control["strace"]) and found["traced"] > 0,
            "control_seen": bool(control["strace"]),
            "processes": found["traced"],
            "sockets_of_this_machine": found["unix"],
        },
    }
    attempts = [*found["guard"], *found["strace"]]
    if alone and found["no_route"]:
        attempts.append({"seen_by": "namespace", "event": "no route", "address": f"{found['no_route']} times"})
    write_json(scratch / "inside.json", {"exit_code": code, "proofs": proofs, "attempts": attempts})
    return 0


def observed(command: list[str], job: dict[str, Any], stem: Path, quiet: bool = False) -> tuple[dict[str, Any], int]:
    """(what each proof saw of a command, its exit code)."""
    log, trace = Path(f"{stem}.guard"), Path(f"{stem}.strace")
    words = [*job["strace"], "-o", str(trace), *command] if job["strace"] else command
    before = no_route() if job["namespaced"] else 0
    environment = os.environ | {egress.VARIABLE: str(log)}
    sink = subprocess.DEVNULL if quiet else None
    try:
        code = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink).returncode
    except OSError as error:
        print(f"egress check: {command[0]}: {error.strerror}", file=sys.stderr)
        code = 127
    noted = egress.attempts(log)
    calls, unix, processes = traced(trace)
    return {
        "guard": [{"seen_by": "guard"} | entry for entry in noted if entry["event"] != "guarded"],
        "guarded": len({entry["process"] for entry in noted if entry["event"] == "guarded"}),
        "strace": calls,
        "unix": unix,
        "traced": processes,
        "no_route": no_route() - before if job["namespaced"] else 0,
    }, code


def traced(trace: Path) -> tuple[list[dict[str, Any]], list[str], int]:
    """(calls to other machines, sockets of this machine, processes) in what strace wrote."""
    calls, unix, processes = [], set(), set()
    for line in trace.read_text(encoding="utf-8", errors="replace").splitlines() if trace.is_file() else []:
        process, _, rest = line.partition(" ")
        processes.add(process)
        call = re.match(r"\s*(connect|sendto|sendmsg|sendmmsg|bind)\(", rest)
        for family, body in re.findall(r"\{sa_family=(AF_\w+)([^}]*)\}", rest) if call else []:
            if family == "AF_UNIX":
                path = re.findall(r'sun_path=@?"([^"]*)"', body)
                unix |= set(path)
                address = path[0] if path and RESOLVERS.search(path[0]) else ""
            elif family in ("AF_NETLINK", "AF_UNSPEC"):
                address = ""
            else:
                address = other_machine(family, body, listening=call[1] == "bind")
            if address:
                entry = {"seen_by": "strace", "event": call[1], "address": address, "process": int(process)}
                calls.append(entry)
    return calls, sorted(unix), len(processes)


def other_machine(family: str, body: str, *, listening: bool) -> str:
    """The address in a socket address as strace prints it, when it is not of this machine; else empty."""
    host = re.search(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"', body)
    if not host:
        return f"{family}{body}"
    name, port = host[1] or host[2], re.search(r"port=htons\((\d+)\)", body)
    return "" if egress.is_local(name, listening=listening) else f"{name}:{port[1] if port else ''}"


def loopback_up() -> None:
    """Switches the namespace's loopback interface on (SIOCGIFFLAGS, SIOCSIFFLAGS; needs no program)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        flags = struct.unpack("16sh", fcntl.ioctl(any_socket, 0x8913, struct.pack("16sh", b"lo", 0)))[1]
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", flags | 1))


def no_route() -> int:
    """How often this namespace's kernel was asked for a place that it has no route to."""
    lines = Path("/proc/net/snmp").read_text(encoding="utf-8").splitlines()
    names, values = (line.split() for line in lines if line.startswith("Ip: "))
    count = int(values[names.index("OutNoRoutes")])
    six = Path("/proc/net/snmp6")
    rows = dict(line.split() for line in six.read_text(encoding="utf-8").splitlines()) if six.is_file() else {}
    return count + int(rows["Ip6OutNoRoutes"] if "Ip6OutNoRoutes" in rows else 0)


def unreachable() -> bool:
    """Whether the kernel says of a foreign address that there is no way to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(("192.0.2.1", 9)) == errno.ENETUNREACH


def stages(scratch: Path) -> list[str]:
    """The stages that the job finished, by the events of its run."""
    found = []
    for path in sorted(scratch.glob("runs/*/*/events.jsonl")):
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found += [event["stage"] for event in events if event["what"] == "finished"]
    return found


def verdict(found: dict[str, Any], *, whole: bool) -> tuple[str, int]:
    """(the sentence, the exit code)."""
    given = [name for name, proof in found["proofs"].items() if proof["given"]]
    if found["attempts"]:
        return f"FAILED: {len(found['attempts'])} attempts to reach something else", 1
    if found["exit_code"]:
        return f"no verdict: the command ended with exit code {found['exit_code']}", 3
    if whole and found["stages"] != ["data", "train", "evaluate", "merge", "export", "report"]:
        return "no verdict: the job did not carry out all its stages", 3
    if not given:
        return "no verdict: none of the proofs could be given here", 2
    return f"no attempt was made, by {', '.join(given)}", 0


def versions() -> dict[str, str | None]:
    """What was run, on what."""
    packages = ("torch", "transformers", "trl", "datasets", "huggingface-hub")
    strace = shutil.which("strace")
    told = subprocess.run([strace, "--version"], capture_output=True, text=True).stdout if strace else ""
    return {
        "finetune": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()) or ctypes.__name__,
        "strace": told.splitlines()[0] if told else None,
        **{name: metadata.version(name) for name in packages},
    }


def tell(found: dict[str, Any], out: Path) -> None:
    """Prints the result."""
    for attempt in found["attempts"][:20]:
        program = f"  ({attempt['program']})" if "program" in attempt else ""
        print(f"  {attempt['seen_by']}: {attempt['event']} {attempt['address']}{program}")
    for sentence in found["not_proven"]:
        print(f"  not proven: {sentence}")
    print(f"{found['verdict']}. {out}", flush=True)


def say(text: str) -> None:
    """Prints a line at once."""
    print(f"egress check: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
