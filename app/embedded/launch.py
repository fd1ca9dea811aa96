"""Executes a server so that it dies with its parent and, for root, under another user id.

Run as a script with the standard library alone: `launch.py MODE USER SIGNAL PARENT DIRECTORY -- COMMAND...`.
Postgres refuses to run as root, so there are three modes:

plain   only the parent-death signal.
userns  a user namespace in which the caller is called USER: to the kernel, and so to every file, the server is
        still the caller, whatever directory lies above the data.
setuid  USER for real, keeping the one capability that lets it enter directories that others cannot.
        For containers that forbid user namespaces.
"""

import ctypes
import os
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_SET_SECUREBITS = 28
SECBIT_NO_SETUID_FIXUP = 1 << 2
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CLONE_NEWUSER = 0x10000000
CAP_VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2

_libc = ctypes.CDLL(None, use_errno=True)


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def main(arguments: list[str]) -> None:
    """Takes on the identity asked for, ties itself to the parent, and becomes the command."""
    mode, user, signal_number, parent, directory, _, *command = arguments
    if mode == "userns":
        _enter_user_namespace(int(user))
    elif mode == "setuid":
        _become(int(user))
    os.chdir(directory)
    if not os.access(command[0], os.X_OK):
        raise PermissionError(f"this user may not execute {command[0]}")
    if sys.platform == "linux":
        # After the change of user, which clears it; then the check, for a parent that died before.
        _check(_libc.prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0), "prctl")
        if os.getppid() != int(parent):
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - the whole purpose


def _enter_user_namespace(user: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(CLONE_NEWUSER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")  # a group map may only be written after this
    Path("/proc/self/uid_map").write_text(f"{user} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{user} {gid} 1")


def _become(user: int) -> None:
    header = _CapHeader(CAP_VERSION_3, 0)
    data = (_CapData * 2)()
    _check(_libc.capget(ctypes.byref(header), data), "capget")
    # Docker's default set has the second but not the first, which would be enough.
    kept = next(
        (c for c in (CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE) if data[0].permitted & (1 << c)), None
    )
    _check(_libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl")
    # Without this access(2), which Postgres asks about its own binaries, ignores the capability. Where the
    # right to set it is missing, the check in main() decides.
    _libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    mask = 0 if kept is None else 1 << kept
    for word, value in ((0, mask), (1, 0)):
        data[word].effective = data[word].permitted = data[word].inheritable = value
    _check(_libc.capset(ctypes.byref(header), data), "capset")
    if kept is not None:
        _check(_libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, kept, 0, 0), "prctl")


def _check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


if __name__ == "__main__":
    main(sys.argv[1:])
