"""The endpoint as a Serve config file names it (`import_path: serve.build:build`), for KubeRay and `serve deploy`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.deploy import application
from serve.keys import check_bind, read_keys
from serve.target import read_target


def build(args: Mapping[str, Any]) -> Any:
    """An application over a finished run or a model. The address is the cluster's (`http_options`).

    Args:
        args: `path`, a run's directory or a model's, and keys of `serve` that replace those of the run's config.

    Raises:
        UserError: it cannot be served, or `host` is not localhost and there is no key.
    """
    target = read_target(Path(args["path"]), {key: value for key, value in args.items() if key != "path"})
    keys = read_keys(target.settings.api_keys)
    check_bind(target.settings.host, keys)
    return application(target.settings, target.served, keys, target.cpus, target.gpus)
