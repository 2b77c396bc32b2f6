"""Where the parts of a corpus are: files on any file system that fsspec knows, or a data set of the hub.

A source is a file, a directory, a pattern, an archive's content or a URL. Of a directory the files of one format are
read, and what is left out is named.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
from typing import Any

from ..base.errors import PipelineError, RecipeError
from ..recipe.schema import CorpusConfig
from .formats import KINDS
from .parts import HubDataSet, SourceFile, Sources

logger = logging.getLogger(__name__)

_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst")
_TARS = {".tgz": "gzip", ".tbz": "bz2", ".tbz2": "bz2", ".txz": "xz"}
"""Endings that mean .tar plus a compression."""
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|changelog|citation)\b.*|.*\.(md|rst|ya?ml|toml|ini|cfg|lock|sha256)"
    r"|(dataset_infos?|state|config|metadata)\.json|cache-.*\.arrow|checksums?\b.*",
    re.IGNORECASE,
)
"""Names of files that tell about the data of a directory: read only where there is nothing else."""
_NO_TEXT = re.compile(
    r"\.(png|jpe?g|gif|webp|bmp|svg|pdf|docx?|xlsx?|pptx?|epub|mp3|wav|flac|ogg|mp4|avi|mov|webm|bin|idx|np[yz]|pth?|ckpt"
    r"|safetensors|gguf|onnx|pkl|pickle|joblib|h5|hdf5|db|sqlite3?|avro|orc|rar|7z|so|dll|exe|o|a|pyc|class|jar|ttf|woff2?|ico)"
)
"""Endings of files that have no text in a format that is read."""


def find_sources(config: CorpusConfig) -> Sources:
    """The files of all sources, sorted within each source; of a directory, the files of one format below it.

    Raises RecipeError for a source that does not exist, or has no file that can be read.
    """
    if config.format == "hub":
        if not isinstance(config.source, str):
            raise RecipeError("corpus.source must be one dataset name with format = 'hub'")
        return Sources([HubDataSet(config.source, config.hub_config, config.hub_split, config.hub_revision)])
    found, notes = list[SourceFile](), list[str]()
    for source in [config.source] if isinstance(config.source, str) else config.source:
        try:
            files, others = _files_of(source, config)
        except PermissionError as error:
            raise RecipeError(f"corpus.source: {source!r}: permission denied: make it readable to this user") from error
        except PipelineError:
            raise
        except Exception as error:  # each client library raises its own classes
            raise RecipeError(f"corpus.source: cannot open {source!r} ({' '.join(str(error).split())})") from error
        found += files
        kinds = ", ".join(sorted({_ending(file.name) or file.format for file in files}))
        if others:
            notes.append(
                f"corpus.source: of {source}, the {kinds} files are read ({len(files):,}), not {_some(others)}: name these "
                "by a pattern to read them too"
            )
        elif len({file.format for file in files}) > 1:
            notes.append(f"corpus.source: {source} means files of several formats ({kinds}): all of them are read")
    for file in found:
        if file.info.get("islink") and not file.system.exists(file.name):
            raise RecipeError(f"corpus.source: {file.name} is a broken link: mend or remove it")
    return Sources(found, notes)


def _files_of(source: str, config: CorpusConfig) -> tuple[list[SourceFile], list[str]]:
    """The files of one source, and the names of those of its directory that are not read."""
    from fsspec.core import url_to_fs

    packed = next((kind for ending, kind in _TARS.items() if source.lower().endswith(ending)), None)
    # fsspec recognises .tar.gz by itself, .tgz it does not.
    options = {"tar": {"compression": packed}} if packed and source.startswith("tar://") else {}
    system, path = url_to_fs(source, **options)
    archive = source.rpartition("::")[2] if "::" in source else ""
    if posixpath.basename(path) == "**" and not system.exists(path):
        path = posixpath.dirname(path)  # everything below a directory, or in an archive
        folder = True
    else:
        folder = system.isdir(path)
    if folder:
        return _files_of_directory(system, path, source, archive, config)
    if any(sign in path for sign in "*?[") and not system.exists(path):
        infos = {name: info for name, info in system.glob(path, detail=True).items() if info["type"] != "directory"}
    else:
        infos = {path: system.info(path)} if system.exists(path) else {}
    if not infos:
        is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None and not source.startswith(".")
        hint = ": a data set of the hub needs corpus.format = 'hub'" if is_name else ""
        raise RecipeError(f"corpus.source: no file matches {source!r}{hint}")
    for name in infos:
        _refuse_archive(name, source if name == path else name)
    return [SourceFile(system, name, _format(name, config), infos[name], archive) for name in sorted(infos)], []


def _files_of_directory(
    system: Any, path: str, source: str, archive: str, config: CorpusConfig
) -> tuple[list[SourceFile], list[str]]:
    """The files of one format below a directory, and the names of the others.

    What `datasets.save_to_disk` wrote is read as that. Else hidden files are left out, those that tell about the others
    (`_ABOUT`), and of the rest those that are not of the recipe's format, or of the format with most bytes; text files
    of two endings count as two formats.
    """
    infos = system.find(path, detail=True)
    sizes = {name: info.get("size") or 0 for name, info in infos.items()}
    inside = {name: name.removeprefix(path).lstrip("/") for name in sizes}
    if not sizes:
        raise RecipeError(f"corpus.source: no file matches {source!r}: the directory is empty")
    names = _saved_data_set(system, path, config) if config.format in ("auto", "arrow") else None
    if names is not None:
        return [SourceFile(system, name, "arrow", infos.get(name) or system.info(name)) for name in names], []
    archives = {name for name in sizes if _archive(name) is not None}
    groups: dict[str, list[str]] = {}
    for about in (False, True):
        for name, short in inside.items():
            hidden = any(part.startswith((".", "_")) for part in short.split("/"))
            if not hidden and name not in archives and bool(_ABOUT.fullmatch(posixpath.basename(name))) == about:
                kind, ending = _kind(name), _ending(name)
                if not _NO_TEXT.fullmatch(ending):
                    groups.setdefault(ending if kind == "text" else kind, []).append(name)
        if groups:
            break
    if not groups:
        for name in archives:
            _refuse_archive(name, name)
        raise RecipeError(
            f"corpus.source: {source} has no file that can be read, only {_some(list(inside.values()))}: give text, JSON "
            "lines, CSV, Parquet or Arrow files"
        )
    if config.format != "auto":
        own = groups.get(config.format)
        texts = {group: names for group, names in groups.items() if group not in KINDS}
        groups = {config.format: own} if own else texts or groups
    chosen = max(groups.values(), key=lambda names: (sum(sizes[name] for name in names), len(names)))
    files = [SourceFile(system, name, _format(name, config), infos[name], archive) for name in sorted(chosen)]
    read = set(chosen)
    return files, sorted((short for name, short in inside.items() if name not in read), key=lambda n: (n[0] in "._", n))


def _saved_data_set(system: Any, path: str, config: CorpusConfig) -> list[str] | None:
    """The Arrow files of a directory that `datasets.save_to_disk` wrote, of the recipe's split; None for others."""
    if system.exists(f"{path}/dataset_dict.json"):
        splits = json.loads(system.cat_file(f"{path}/dataset_dict.json")).get("splits", [])
        if config.hub_split not in splits:
            raise RecipeError(
                f"corpus.source: {path} has no split {config.hub_split!r}: set corpus.hub_split to one of {', '.join(splits)}"
            )
        path = f"{path}/{config.hub_split}"
    if not (system.exists(f"{path}/state.json") and system.exists(f"{path}/dataset_info.json")):
        return None
    state = json.loads(system.cat_file(f"{path}/state.json"))
    if state.get("_indices_data_files"):
        raise RecipeError(
            f"corpus.source: {path} is a selection of rows that an old version of datasets saved: save it again"
        )
    return [f"{path}/{file['filename']}" for file in state.get("_data_files", [])]


def _plain(name: str) -> str:
    """A file name in lower case, without the ending of its compression."""
    name = posixpath.basename(name).lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return name


def _ending(name: str) -> str:
    """Ending of a file, with its dot; numbers are none."""
    ending = posixpath.splitext(_plain(name))[1]
    return "" if ending[1:].isdecimal() else ending


def _kind(name: str) -> str:
    """Format of a file, by its name."""
    ending = _ending(name).removeprefix(".")
    return next((kind for kind, endings in KINDS.items() if ending in endings), "text")


def _format(name: str, config: CorpusConfig) -> str:
    return _kind(name) if config.format == "auto" else config.format


def _archive(name: str) -> str | None:
    """fsspec's protocol for an archive, by its name; None for other files."""
    plain = _plain(name)
    return "zip" if plain.endswith(".zip") else "tar" if plain.endswith((".tar", *_TARS)) else None


def _refuse_archive(name: str, shown: str) -> None:
    if (kind := _archive(name)) is not None:
        raise RecipeError(
            f"corpus.source: {shown} is an archive: name the files inside, all of them by '{kind}://**::{shown}'"
        )


def _some(names: list[str]) -> str:
    """Some names in a line."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def shown_source(source: str | list[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)
