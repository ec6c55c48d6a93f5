"""YAML files that people write: read safely, with the line of whatever is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """A key that comes twice is an error, not the last one's silent win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen and key != "<<":
                raise ValueError(f"{key!r} is there twice, in lines {seen[key]} and {line}. Remove one of them.")
            seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str = "") -> Any:
    """What a YAML file says; ``what`` comes before its name in errors.

    Raises:
        ValueError: a folder, not UTF-8, not YAML, or a key that comes twice.
    """
    named = f"{what} {path}".lstrip()
    if Path(path).is_dir():
        raise ValueError(f"{named} is a folder. Name the YAML file itself, such as {Path(path) / 'config.yaml'}.")
    try:
        return yaml.load(
            Path(path).read_text(encoding="utf-8"), Loader=_Loader
        )  # a SafeLoader: it makes plain values only
    except UnicodeDecodeError as error:
        raise ValueError(f"{named} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{named} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
