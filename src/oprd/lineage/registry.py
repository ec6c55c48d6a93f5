"""A folder of promoted students: numbered, checked, one of them current, with a way back.

    REGISTRY/registry.json    what there is; the only truth, replaced whole
    REGISTRY/versions/0003/   a copy of a run's final/, with the run's manifest.json as run-manifest.json
    REGISTRY/current          a link to the current version's folder, derived from registry.json
    REGISTRY/.lock            held while registry.json changes, never while a model is copied

A folder gets its number, then registry.json its entry, then the link its target: a kill on the way leaves the old state or
the new one, and at most a folder without an entry, whose number is not given again.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from oprd import records
from oprd.lineage import hashing

SCHEMA = 1
MANIFEST = "run-manifest.json"
UNCHECKED = [name for name in hashing.SKIP if name != MANIFEST]  # of a version, by verify
ALIVE = ".incoming.lock"  # in an incoming folder; the system frees it when its holder dies, however that happens


class Registry:
    """Students that passed their gates. Several processes may use one folder at once; only `promote` creates it.

    Every method raises ValueError for a registry.json that is damaged or of a newer schema, and leaves it as it is; those
    that write raise TimeoutError when another process does not let go of the folder for ``timeout`` seconds.
    """

    def __init__(self, directory: str | os.PathLike, *, timeout: float = 60.0) -> None:
        self.directory = Path(directory)
        self.timeout = timeout

    def versions(self) -> list[dict[str, Any]]:
        """Every version ever promoted, oldest first; none if nothing was."""
        return self._read()["versions"]

    def current(self) -> dict[str, Any] | None:
        """The version to use, or None if nothing was promoted yet."""
        registry = self._read()
        return _entry(registry, registry["current"]) if registry["versions"] else None

    def folder(self, version: int) -> Path:
        """Where a version lies; it loads with ``from_pretrained``."""
        return self.directory / "versions" / f"{version:04d}"

    def verify(self) -> list[str]:
        """What is not as it was recorded, in words; empty if all is well. Reads every file.

        A retired version may have been deleted: that is no fault.
        """
        self._must_exist()
        registry = self._read()
        faults = [fault for entry in registry["versions"] for fault in self._version_faults(entry)]
        if self._layout_faults(registry):  # perhaps another process is just at it: look again when none is
            with self._locked():
                faults += self._layout_faults(self._read())
        return faults

    def promote(
        self, run: str | os.PathLike, *, gate: dict | None, note: str | None = None, force_reason: str | None = None
    ) -> int:
        """Copy a run's ``final/`` into the registry, make it the current version, and return its number.

        Args:
            run: directory that holds ``final/``; stays as it is.
            gate: what its gates said: ``passed``, ``model_hash`` (`combined_hash` of ``final/`` when they ran), and
                whatever else is to be recorded.
            note: for people.
            force_reason: why to promote a student whose gates did not run, did not pass, or judged other files.

        Raises:
            ValueError: no model there; gates not passed by these very files; or the model is an active version already.
        """
        final, manifest = Path(run) / "final", Path(run) / "manifest.json"
        missing = [name for name in ("config.json", "*.safetensors") if not any(final.glob(name))]
        if missing:
            raise ValueError(f"{final} lacks {' and '.join(missing)}. Name the directory of a run that has finished.")
        if force_reason is not None:
            _must_say(force_reason)
        said = json.loads(records.as_json({"gate": gate, "note": note}, "The gate or the note"))
        files = hashing.folder_hashes(final)
        model_hash = hashing.combined_hash(files)
        fault = _gate_fault(said["gate"], model_hash)
        if fault and force_reason is None:
            raise ValueError(
                f"{final} is not promoted: {fault}. Run its gates (oprd gate), or say why to do without (--without_gate REASON)."
            )
        said_then = records.read_json(manifest) if manifest.is_file() else {}
        made = ((said_then.get("final") if isinstance(said_then, dict) else None) or {}).get("hash")
        if made not in (None, model_hash):
            raise ValueError(
                f"{final} has changed since its run wrote it: its manifest.json names other content. Restore it."
            )
        _refuse_active(self._read(), model_hash)  # before the copy, which takes long; and again after it
        records.check_folder(self.directory, "registry")
        with self._incoming() as incoming:
            hashing.copy_folder(final, incoming)
            if hashing.folder_hashes(incoming) != files:
                raise ValueError(f"{final} changed while it was copied, or was misread. Promote it once it is at rest.")
            if manifest.is_file():
                shutil.copyfile(manifest, incoming / MANIFEST)
            if (incoming / MANIFEST).is_file():
                files[MANIFEST] = hashing.file_hash(incoming / MANIFEST)
            records.sync(incoming, *incoming.rglob("*"))
            entry = {"source": str(run), "model_hash": model_hash, "files": files} | said
            if fault:
                entry["forced"] = {"over": fault, "reason": force_reason}
            with self._edit() as registry:
                _refuse_active(registry, model_hash)
                number = 1 + max([e["version"] for e in registry["versions"]] + self._numbered(), default=0)
                (incoming / ALIVE).unlink()
                os.rename(incoming, self.folder(number))
                records.sync(self.folder(number).parent)
                at = _record(registry, "promote", number, force_reason)
                registry["versions"].append({"version": number, "state": "active", "promoted": at} | entry)
                registry["current"] = number
        return number

    def retire(self, version: int, reason: str) -> None:
        """Mark a version as not to be used again. Its files stay, for a person to delete.

        Raises:
            ValueError: unknown, current or retired already; or no reason.
        """
        _must_say(reason)
        with self._edit() as registry:
            entry = _entry(registry, version, "active")
            if version == registry["current"]:
                raise ValueError(f"Version {version} is the current one. Roll back first, or promote another.")
            at = _record(registry, "retire", version, reason)
            entry.update(state="retired", retired={"at": at, "reason": reason})

    def rollback(self, reason: str, *, to: int | None = None) -> int:
        """Go back to the newest active version before the current one, or to ``to``; the one that is left is retired.

        Raises:
            ValueError: nothing to go back to; ``to`` unknown, retired or current; its files are gone; or no reason.
        """
        _must_say(reason)
        with self._edit() as registry:
            left = registry["current"]
            if to is None:
                before = [e["version"] for e in registry["versions"] if e["state"] == "active" and e["version"] < left]
                if not before:
                    raise ValueError(
                        "No active version came before. Promote another, or name a version to go back to (--to)."
                    )
                to = max(before)
            _entry(registry, to, "active")
            if to == left:
                raise ValueError(f"Version {to} is the current one. Name another.")
            if not self.folder(to).is_dir():
                raise ValueError(f"The files of version {to} are gone: {self.folder(to)}. Restore them, or retire it.")
            if faults := self._version_faults(_entry(registry, to)):
                raise ValueError(f"{' '.join(faults)} Restore version {to}, or name another.")
            at = _record(registry, "rollback", to, reason)
            _entry(registry, left).update(state="retired", retired={"at": at, "reason": reason})
            registry["current"] = to
        return to

    def _read(self) -> dict[str, Any]:
        if self.directory.is_file():
            raise ValueError(f"The registry {self.directory} is a file. Name a folder.")
        path, link = self.directory / "registry.json", self.directory / "current"
        linked = os.path.lexists(link)  # looked up first: a link is never older than registry.json
        try:
            registry = json.loads(path.read_bytes())
            if (schema := registry["schema"]) == SCHEMA:
                active = [e["version"] for e in registry["versions"] if e["state"] == "active"]
                if registry["current"] not in (active or [None]) or not isinstance(registry["history"], list):
                    raise ValueError("it contradicts itself")
                for entry in registry["versions"]:
                    if type(entry["version"]) is not int or entry["version"] < 1:  # a folder is named by it
                        raise ValueError(f"version {entry['version']!r} is no number")
                    if not isinstance(entry["files"], dict):
                        raise ValueError(f"version {entry['version']} has no files")
        except FileNotFoundError:
            if linked:
                raise ValueError(f"{path} is gone, though {link} exists. Restore it from a backup.") from None
            return {"schema": SCHEMA, "current": None, "versions": [], "history": []}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}). Restore it from a backup.") from error
        if schema != SCHEMA:
            raise ValueError(f"{path} has schema {schema}, not {SCHEMA}. Use the version of oprd that wrote it.")
        return registry

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._must_exist()
        lock = FileLock(self.directory / ".lock", timeout=self.timeout)
        try:
            lock.acquire()
        except Timeout as error:
            raise TimeoutError(f"{lock.lock_file} was held for {self.timeout:g} s. Try again later.") from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _edit(self) -> Iterator[dict[str, Any]]:
        """The registry, locked, for the caller to change; written unless the caller raises."""
        with self._locked():
            registry = self._read()
            self._link(registry["current"])  # whoever wrote last may have been killed before it
            yield registry
            records.write_json(self.directory / "registry.json", registry)
            self._link(registry["current"])

    def _link(self, version: int | None) -> None:
        """Have ``current`` lead to a version, in one step."""
        link, fresh = self.directory / "current", self.directory / ".current"
        if link.exists() and not link.is_symlink():
            raise ValueError(f"{link} is in the way: a link belongs there. Move it elsewhere.")
        if not self._leads_to(version):
            fresh.unlink(missing_ok=True)
            os.symlink(self.folder(version).relative_to(self.directory), fresh)
            os.replace(fresh, link)
            records.sync(self.directory)

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        """A folder for a copy, removed unless it was renamed. Those that the dead left behind are removed as well."""
        versions = self.directory / "versions"
        versions.mkdir(parents=True, exist_ok=True)
        incoming = versions / f".incoming-{os.getpid()}-{secrets.token_hex(4)}"
        alive = FileLock(incoming / ALIVE)
        with self._locked():  # so that none is seen before it is marked as alive
            self._read()  # where registry.json is damaged, nothing is touched
            for leftover in versions.glob(".incoming-*"):
                with suppress(OSError), FileLock(leftover / ALIVE, timeout=0):
                    shutil.rmtree(leftover, ignore_errors=True)
            for partial in self.directory.glob(".registry.json.*"):
                partial.unlink()
            incoming.mkdir()
            alive.acquire()
        try:
            yield incoming
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
            alive.release()

    def _leads_to(self, version: int | None) -> bool:
        return version is None or (self.directory / "current").resolve() == self.folder(version).resolve()

    def _must_exist(self) -> None:
        if not self.directory.is_dir():
            raise ValueError(f"There is no registry {self.directory}. Promote a run to start one.")

    def _numbered(self) -> list[int]:
        """Numbers that have a folder, with an entry or without."""
        return [int(folder.name) for folder in self.directory.glob("versions/*") if folder.name.isdecimal()]

    def _version_faults(self, entry: Mapping[str, Any]) -> list[str]:
        number, folder = entry["version"], self.folder(entry["version"])
        if entry["state"] == "retired" and not folder.exists():
            return []
        try:
            found = hashing.folder_hashes(folder, skip=UNCHECKED)
        except ValueError as error:
            return [f"Version {number}: {error}"]
        return [f"Version {number}: {line}." for line in hashing.differences(entry["files"], found)]

    def _layout_faults(self, registry: Mapping[str, Any]) -> list[str]:
        faults = [
            f"{self.folder(number)} has no entry. Delete it if a promotion was interrupted, or restore a newer registry.json."
            for number in sorted(set(self._numbered()) - {entry["version"] for entry in registry["versions"]})
        ]
        if not self._leads_to(registry["current"]):
            faults.append(f"{self.directory / 'current'} does not lead to version {registry['current']}.")
        return faults


def _gate_fault(gate: Any, model_hash: str) -> str | None:
    if not isinstance(gate, dict):
        return "no gates ran on it"
    if gate.get("passed") is not True:
        return "it did not pass its gates"
    if gate.get("model_hash") != model_hash:
        return f"its gates judged other files (model_hash {gate.get('model_hash')}, now {model_hash})"
    return None


def _refuse_active(registry: Mapping[str, Any], model_hash: str) -> None:
    for entry in registry["versions"]:
        if entry["state"] == "active" and entry["model_hash"] == model_hash:
            raise ValueError(
                f"This model is the active version {entry['version']} already"
                + (
                    ": it is the current one."
                    if entry["version"] == registry["current"]
                    else ". Roll back to that one."
                )
            )


def _entry(registry: Mapping[str, Any], version: int, state: str | None = None) -> dict[str, Any]:
    for entry in registry["versions"]:
        if entry["version"] == version and state in (None, entry["state"]):
            return entry
    known = ", ".join(f"{entry['version']} ({entry['state']})" for entry in registry["versions"])
    raise ValueError(f"There is no {state or ''} version {version}. Versions: {known or 'none'}.".replace("  ", " "))


def _must_say(reason: str) -> None:
    if not isinstance(reason, str) or not reason.strip():
        raise ValueError("The reason is empty. Say why: it is kept for whoever asks later.")


def _record(registry: dict[str, Any], action: str, version: int, reason: str | None) -> str:
    """Add to the history, before ``current`` changes; the time."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    step = {"at": at, "action": action, "version": version, "reason": reason, "from": registry["current"]}
    registry["history"].append(step)
    return at
