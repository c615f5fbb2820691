"""Takes from this process all that generated code does not need, then becomes the interpreter that runs it.

Started by `sandbox.py` as `python -I -S sandbox_child.py PROGRAM SECONDS MEMORY_MIB`, from the folder of the program.
What cannot be taken ends the process with code 90 before a line of the program has run.

- Landlock (the kernel's own file rules, Linux 5.13): nothing can be written, made or removed, and nothing read but the
  interpreter, the system's libraries and the program.
- A seccomp filter: no process or thread, no socket, no signal to others, no namespaces, mounts, keys or tracing.
- An empty network namespace where the kernel grants one, no capabilities, no new privileges.
- Limits on processor time, memory, open files and file sizes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path

DENIED = {
    # name: (number on x86_64, number on aarch64); -1 where there is none
    "socket": (41, 198),
    "socketpair": (53, 199),
    "clone": (56, 220),
    "fork": (57, -1),
    "vfork": (58, -1),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "truncate": (76, 45),
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, -1),
    "lchown": (94, -1),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "shmget": (29, 194),
    "memfd_create": (319, 279),
    "userfaultfd": (323, 282),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "clone3": (435, 435),
    "fchmodat2": (452, 452),
}
"""System calls that are answered with EPERM."""
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> (column of DENIED, what the kernel calls it)."""
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
EXECUTE, READ_FILE, READ_DIR = 1, 4, 8
RIGHTS_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Landlock's version -> every right on files that it knows; all of them are taken."""
NEWUSER, NEWNET = 0x10000000, 0x40000000
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446


def main() -> None:
    """Confines this process and becomes the program."""
    program, seconds, memory_mib = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with whoever started it
    libc.unshare(NEWUSER | NEWNET)  # where the kernel refuses it, the filter below denies every socket all the same
    for capability in range(64):
        libc.prctl(24, capability)  # PR_CAPBSET_DROP: so that not even root has one after the next exec
    if libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        _give_up("no_new_privs is refused")
    _limit(seconds, memory_mib)
    interpreter = Path(sys.executable).resolve()
    _take_files(libc, [*map(Path, READABLE), Path(sys.base_prefix), interpreter.parent, Path(program).parent])
    _filter_calls(libc)
    os.execve(interpreter, [str(interpreter), "-I", "-S", "-B", program], {})


def _limit(seconds: int, memory_mib: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_mib << 20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _take_files(libc: ctypes.CDLL, readable: list[Path]) -> None:
    """Landlock: below `readable` files can be read and run; nothing else can be done with any file."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        _give_up("this kernel has no Landlock")
    rights = ctypes.create_string_buffer(struct.pack("=Q", RIGHTS_BY_VERSION[min(version, 5)]))
    ruleset = libc.syscall(CREATE_RULESET, rights, 8, 0)
    if ruleset < 0:
        _give_up("Landlock makes no rules")
    for path in readable:
        if not path.exists():
            continue
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = EXECUTE | READ_FILE | (READ_DIR if path.is_dir() else 0)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, folder))
        if libc.syscall(ADD_RULE, ruleset, 1, rule, 0) != 0:
            _give_up(f"Landlock takes no rule for {path}")
        os.close(folder)
    if libc.syscall(RESTRICT_SELF, ruleset, 0) != 0:
        _give_up("Landlock does not restrict")
    os.close(ruleset)


def _filter_calls(libc: ctypes.CDLL) -> None:
    """A seccomp filter: calls of another architecture end the process, those of DENIED fail with EPERM."""
    if platform.machine() not in ARCHITECTURES:
        _give_up(f"no filter is written for {platform.machine()}")
    column, architecture = ARCHITECTURES[platform.machine()]
    numbers = sorted(pair[column] for pair in DENIED.values() if pair[column] >= 0)
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    code = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 1, 0, architecture),
        (answer, 0, 0, 0x80000000),  # kill the process
        (load, 0, 0, 0),  # seccomp_data.nr
        (at_least, len(numbers) + 1, 0, 0x40000000),  # x32 calls, with numbers of their own
        *((equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        (answer, 0, 0, 0x7FFF0000),  # allow
        (answer, 0, 0, 0x00050000 | 1),  # EPERM
    ]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(instructions)))
    if libc.prctl(22, 2, header, 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        _give_up("seccomp is refused")


def _give_up(why: str) -> None:
    print(f"cannot confine: {why}", flush=True)
    os._exit(90)


if __name__ == "__main__":
    main()
