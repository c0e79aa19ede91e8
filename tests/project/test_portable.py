"""Every module of lift_fast can be imported where Python has no POSIX: no `resource`, and fewer names in `os`."""

import subprocess
import sys

SCRIPT = """
import builtins, importlib, pkgutil, types

GONE = {
    "os": "fork forkpty register_at_fork sched_getaffinity sched_setaffinity pread pwrite preadv posix_fadvise "
    "O_NONBLOCK O_CLOEXEC O_DIRECTORY uname getuid geteuid getgid sysconf statvfs killpg setsid nice wait4 WNOHANG",
    "signal": "SIGKILL SIGPIPE SIGHUP SIGUSR1 SIGALRM alarm setitimer pthread_sigmask sigwait",
    "mmap": "MAP_PRIVATE MAP_SHARED MAP_ANONYMOUS PROT_READ PROT_WRITE MADV_RANDOM MADV_WILLNEED",
    "time": "tzset CLOCK_MONOTONIC clock_gettime",
}
NO_MODULE = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}


class Fewer(types.ModuleType):
    def __init__(self, module):
        super().__init__(module.__name__)
        self.module, self.gone = module, set(GONE[module.__name__].split())

    def __getattr__(self, name):
        if name in self.gone:
            raise AttributeError(f"module {self.module.__name__} has no attribute {name}")
        return getattr(self.module, name)


usual, tried = builtins.__import__, set()


def imported(name, globals=None, locals=None, fromlist=(), level=0):
    ours = ((globals or {}).get("__name__") or "").split(".")[0] == "lift_fast"
    if ours and not level and name in NO_MODULE:
        tried.add(name)
        raise ImportError(name)
    found = usual(name, globals, locals, fromlist, level)
    return Fewer(found) if ours and not level and name in GONE else found


builtins.__import__ = imported
import lift_fast

modules = [found.name for found in pkgutil.walk_packages(lift_fast.__path__, "lift_fast.")]
for name in modules:
    importlib.import_module(name)
from lift_fast.data.reading import FILES, cpu_count

print(len(modules), sorted(tried), FILES._most, cpu_count() >= 1)
"""


def test_every_module_is_imported_without_posix():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    modules, rest = done.stdout.split(" ", 1)
    assert int(modules) > 80 and rest == "['fcntl', 'resource'] 128 True\n"
