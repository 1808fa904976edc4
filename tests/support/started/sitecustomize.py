"""What every process of a test's run does before anything else: Python imports this where `PYTHONPATH` leads it here.

Snakemake is started without the executor plugins that are installed for tests of profiles: their kubernetes and boto3
take longer to import than Snakemake itself.

`ESMFLOW_HELD` is `{number} {path}`: with so many segments in its store, a worker waits before it commits another one,
until there is a file at the path. See `workflow_run.Hold`.
"""

import importlib.util
import os
import pkgutil
import sys
import time

_MODULE = "esmflow.store.segments"


class _Finder:
    """Finds the module of segments as it would be found, and wraps its `Store.write` once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_wrap(module):
            load(module)
            _wrap(module.Store)

        spec.loader.exec_module = load_and_wrap
        return spec


def _wrap(store):
    write = store.write
    number, path = os.environ["ESMFLOW_HELD"].split(" ", 1)

    def write_when_released(self, *arguments, **keywords):
        while len(self.names()) >= int(number) and not os.path.exists(path):
            time.sleep(0.02)
        return write(self, *arguments, **keywords)

    store.write = write_when_released


def _without_executors(modules):
    return (module for module in modules if not module.name.startswith("snakemake_executor_plugin_"))


if "ESMFLOW_HELD" in os.environ:
    sys.meta_path.insert(0, _Finder())
if any(os.path.basename(word) == "snakemake" for word in sys.orig_argv[1:3]):
    _iter_modules = pkgutil.iter_modules
    pkgutil.iter_modules = lambda *arguments: _without_executors(_iter_modules(*arguments))
