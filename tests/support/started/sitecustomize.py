"""What every process that a test starts does first: Python imports this where `PYTHONPATH` leads it here.

Most of what such a process costs is its start and its end, so these are made cheap. Unless its command names a profile
or an executor, or it is a job of one, Snakemake is started without what it imports only because that is installed here:
pandas, and plugins with kubernetes and boto3. No process looks for garbage among what it has imported, neither while
it starts nor when it ends.

A Snakemake that has jobs elsewhere asks after them every second; Slurm's plugin waits ten seconds longer each time.

`ESMFLOW_HELD` is `{number} {path}`: with so many segments in its store, a worker waits before it commits another one,
until there is a file at the path. A file `{path}.{process id}` says that it waits. See `workflow_run.Hold`.
"""

import atexit
import gc
import importlib.util
import os
import pkgutil
import sys
import time

_PLUGINS = ("snakemake_executor_plugin_", "snakemake_storage_plugin_")


class _Finder:
    """Finds a module as it would be found, and changes it once it is loaded."""

    def __init__(self, module, change):
        self.module, self.change = module, change

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            self.change(module)

        spec.loader.exec_module = load_and_change
        return spec


def _hold(segments):
    write = segments.Store.write
    number, path = os.environ["ESMFLOW_HELD"].split(" ", 1)

    def write_when_released(self, *arguments, **keywords):
        while len(self.names()) >= int(number) and not os.path.exists(path):
            open(f"{path}.{os.getpid()}", "w").close()
            time.sleep(0.02)
        return write(self, *arguments, **keywords)

    segments.Store.write = write_when_released


def _ask_often(remote):
    async def sleep(self):
        await remote.asyncio.sleep(1)

    remote.RemoteExecutor.sleep = sleep


def _without_plugins(modules):
    return (module for module in modules if not module.name.startswith(_PLUGINS))


if "ESMFLOW_HELD" in os.environ:
    sys.meta_path.insert(0, _Finder("esmflow.store.segments", _hold))
if any(os.path.basename(word) == "snakemake" for word in sys.orig_argv[1:3]):
    sys.meta_path.insert(0, _Finder("snakemake_interface_executor_plugins.executors.remote", _ask_often))
    if {"--profile", "--executor", "--mode"}.isdisjoint(sys.orig_argv):
        _iter_modules = pkgutil.iter_modules
        pkgutil.iter_modules = lambda *arguments: _without_plugins(_iter_modules(*arguments))
        sys.modules["pandas"] = None
gc.set_threshold(100_000, 20, 100)
atexit.register(gc.freeze)
