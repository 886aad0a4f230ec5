"""Plan -> RenderedTree: Jinja templates to files, the same bytes for the same Plan.

Templates see the Plan and a few pure filters, nothing of the host and no clock. An undefined
name is an error (StrictUndefined). A template folder's manifest (`tree.yaml`) names each file
with its mode, so that modes and symlinks are data and not code.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ravectl.errors import RavectlError
from ravectl.model import (
    AUDIT_A_SECOND,
    AUDIT_WAITING,
    BLOCK_SECONDS,
    CONSOLE_SOCKET,
    LOG_BURST_SECONDS,
    LOGIN_FAILURES,
    NEW_CONNECTIONS,
    RELAY_ADDRESS,
    SSH_ANNOUNCEMENT,
    VERIFY_RULE,
    Plan,
    RenderedFile,
    RenderedTree,
)


def render(
    folder: Path, plan: Plan, *, manifest: str = "tree.yaml", **extra: object
) -> RenderedTree:
    """Render every entry of `folder`/`manifest`.

    Templates know the distribution by the folder's name; `extra` are more names for them (the
    engine's own constants). Raises RavectlError naming the template and line when one is wrong.
    """
    # autoescape is for HTML; here configuration files are made and to_json/quote do the quoting
    environment = jinja2.Environment(  # noqa: S701
        loader=jinja2.FileSystemLoader([folder, folder.parent]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["dirname"] = posixpath.dirname
    environment.filters["umask"] = _umask
    environment.filters["nix"] = to_nix
    environment.filters["yaml"] = to_yaml
    environment.filters["ini"] = to_ini
    environment.filters["from_json"] = json.loads
    names = {
        "plan": plan, "distribution": folder.name, "ssh_announcement": SSH_ANNOUNCEMENT,
        "engine": "nix" if folder.name == "nixos" else folder.name,
        "console_socket": CONSOLE_SOCKET,
        "audit_waiting": AUDIT_WAITING, "audit_a_second": AUDIT_A_SECOND,
        "log_burst_seconds": LOG_BURST_SECONDS, "relay_address": RELAY_ADDRESS,
        "verify_rule": VERIFY_RULE, "login_failures": LOGIN_FAILURES,
        "block_seconds": BLOCK_SECONDS, "new_connections": NEW_CONNECTIONS,
        **extra,
    }  # fmt: skip
    entries: dict[str, Any] = yaml.safe_load((folder / manifest).read_text())
    files = [
        _file(environment, path, entry or {}, names)
        for path, entry in entries.items()
        if _wanted(environment, entry or {}, names)
    ]
    return RenderedTree(tuple(sorted(files, key=lambda f: f.path)))


def _wanted(
    environment: jinja2.Environment, entry: dict[str, Any], names: dict[str, object]
) -> bool:
    """Whether a machine of this Plan has the file: `when` is an expression of Jinja."""
    return "when" not in entry or bool(environment.compile_expression(entry["when"])(**names))


def _file(
    environment: jinja2.Environment, path: str, entry: dict[str, Any], names: dict[str, object]
) -> RenderedFile:
    if target := entry.get("link"):
        return RenderedFile(path=path, target=target)
    source = entry.get("from", f"{path}.j2")
    try:
        if entry.get("raw"):
            content = _source(environment, source)
        else:
            content = environment.get_template(source).render(names)
    except jinja2.TemplateError as e:
        line = getattr(e, "lineno", None)
        where = f"{source}:{line}" if line else source
        raise RavectlError(
            f"template {where} cannot be rendered: {e.message}",
            "if you changed the template, mend that line; else install ravectl again",
        ) from None
    return RenderedFile(path=path, content=content, mode=int(str(entry.get("mode", "644")), 8))


def _source(environment: jinja2.Environment, source: str) -> str:
    """A file that is no template: it has braces of its own."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, source)[0]


class _OneLine(yaml.SafeDumper):
    """Texts in double quotes, so that a line break in one is an escape."""


_OneLine.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)
_OneLine.add_representer(tuple, yaml.SafeDumper.represent_list)


def to_yaml(value: Any) -> str:
    """A value on one line of YAML. Not as JSON: a character beyond 16 bits is two there."""
    return yaml.dump([value], Dumper=_OneLine, default_flow_style=True, width=2**31)[1:-2]


def to_ini(value: object) -> str:
    """A value of an INI file as Grafana reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _umask(mode: str) -> str:
    """The umask under which a new file has the octal `mode`."""
    return f"{0o666 & ~int(mode, 8):03o}"


def to_nix(value: object) -> str:
    """A value as a Nix expression that may stand anywhere: as an argument, too."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value) if value >= 0 else f"({value})"
    if isinstance(value, Mapping):
        bindings = "".join(f" {to_nix(str(k))} = {to_nix(v)};" for k, v in value.items())
        return f"{{{bindings} }}"
    if isinstance(value, tuple | list):
        return f"[{''.join(f' {to_nix(v)}' for v in value)} ]"
    # JSON's escapes are Nix's, but for the ones of control characters, which no Plan has
    return json.dumps(str(value), ensure_ascii=False).replace("${", "\\${")


def write_tree(tree: RenderedTree, root: Path) -> None:
    """Write the files of `tree` below `root`, owners as the caller's, modes as rendered."""
    for f in tree.files:
        path = root / f.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if f.target is not None:
            path.unlink(missing_ok=True)
            path.symlink_to(f.target)
            continue
        # never write through a link that a package left here
        path.unlink(missing_ok=True)
        path.write_text(f.content)
        path.chmod(f.mode)
