"""Your own text: files in many forms to documents, streaming.

    folder       every .txt and .md file is a document
    jsonl        every line is one: {"text": "..."}; .gz and .zst are unpacked on the way
    parquet      every row is one; only the text column is read, a batch of rows at a time
    arrayrecord  every record is one: a dataset that TFDS wrote (read through `tfds.data_source`),
                 or plain .array_record files whose records are JSON objects
    tfds         the same by a builder's name; it is downloaded and prepared if need be

What cannot be a document (no UTF-8, no JSON, no text in the field) is dropped and counted in the
ledger; what makes the whole file doubtful (cut short, no such column) is an error of one line.
SeqIO tasks are in `lcl.data.seqio_bridge`. pyarrow, array_record, TFDS are imported when used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from lcl.data.sources import Document, Ledger, SourceError

DEFAULT_PATTERNS = ("*.txt", "*.md")
_READ_AT_ONCE = 256


@dataclasses.dataclass
class Meter:
    """How far a reader is, for the progress bar.

    Attributes:
        done: of `total`, in `unit`.
        total: bytes of the files, or number of records; None: not known.
        unit: "B" or " documents".
    """

    done: int = 0
    total: int | None = None
    unit: str = "B"


# ---- folders of text files


def folder_files(path: str, patterns: Iterable[str] = DEFAULT_PATTERNS) -> list[tuple[str, str]]:
    """Files under a folder, sorted: (full path, path within the folder). Follows no links.

    Args:
        path: a folder, or a folder and a pattern ("notes/**/*.rst").
        patterns: names to take if `path` is a folder alone.

    Raises:
        SourceError: no such folder, or no file that matches.
    """
    if glob.has_magic(path) and not os.path.isdir(path):
        base = path
        while glob.has_magic(base):
            base = os.path.dirname(base)
        base = base or "."
        found = [f for f in glob.glob(path, recursive=True) if os.path.isfile(f)]
        what = repr(path)
    elif os.path.isdir(path):
        base, patterns = path, tuple(patterns)
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns)
        ]
        what = f"{path!r} ({' or '.join(patterns)})"
    else:
        raise SourceError(f"no folder {path!r}; give a folder of text files or a pattern")
    if not found:
        raise SourceError(f"no file in {what}; give another pattern, e.g. {path}/**/*.rst")
    return sorted((file, os.path.relpath(file, base)) for file in found)


def folder_documents(
    path: str,
    ledger: Ledger,
    *,
    patterns: Iterable[str] = DEFAULT_PATTERNS,
    meter: Meter | None = None,
) -> Iterator[Document]:
    """Reads every text file under a folder as one document.

    Links and files that are not UTF-8 are dropped and counted; a file that cannot be opened is an
    error, since a corpus that depends on permissions is no corpus.
    """
    source = os.path.basename(os.path.abspath(path))
    for file, name in folder_files(path, patterns):
        if os.path.islink(file):
            ledger.drop("symbolic link")
            continue
        try:
            with open(file, "rb") as stream:
                data = stream.read()
        except OSError as error:
            raise SourceError(f"{file!r}: {error.strerror}; mend or move it") from error
        if meter is not None:
            meter.done += len(data)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            ledger.drop("not UTF-8")
            continue
        del data
        yield Document(name=name, text=text, source=source)


# ---- lines of JSON


def files_of(path: str, endings: tuple[str, ...]) -> list[str]:
    """The file, or the files of a folder or pattern, sorted; a folder is searched for `endings`.

    Raises:
        SourceError: there is none.
    """
    if os.path.isdir(path):
        found = glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
        files = sorted(f for f in found if f.endswith(endings) and os.path.isfile(f))
    else:
        files = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
        if not files and os.path.isfile(path):
            files = [path]
    if not files:
        raise SourceError(f"no file {path!r}; give a {' or '.join(endings)} file, or a pattern")
    return files


def jsonl_files(path: str) -> list[str]:
    """The .jsonl(.gz, .zst) file, or those of a folder or pattern, sorted."""
    return files_of(path, (".jsonl", ".jsonl.gz", ".jsonl.zst"))


def jsonl_documents(
    path: str, ledger: Ledger, *, field: str = "text", meter: Meter | None = None
) -> Iterator[Document]:
    """Reads one document a line, streaming: {"text": "..."}; .gz and .zst are unpacked on the way.

    A line that is no JSON object, is not UTF-8 or has no such field is dropped and counted. A file
    in which no line has the field, and a compressed file that ends too early, are errors.
    """
    for file in jsonl_files(path):
        yield from _json_documents(file, _lines(file, meter), ledger, field)


def _json_documents(
    file: str, records: Iterable[bytes], ledger: Ledger, field: str
) -> Iterator[Document]:
    source = os.path.basename(file)
    fields: set[str] = set()
    good = bad = 0
    for number, line in enumerate(records, start=1):
        if not line or line.isspace():
            continue
        bad += 1
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            ledger.drop("not UTF-8")
            continue
        except (ValueError, RecursionError):
            ledger.drop("not JSON")
            continue
        if not isinstance(value, dict):
            ledger.drop("no JSON object")
        elif not isinstance(value.get(field), str):
            fields.update(list(value)[:20])
            ledger.drop(f"no text in field {field!r}")
        else:
            bad, good = bad - 1, good + 1
            yield Document(name=f"{source}:{number}", text=value[field], source=source)
    if bad and not good:
        there = f"its fields are {', '.join(sorted(fields))}" if fields else "it has none"
        raise SourceError(
            f"no line of {file!r} has text in the field {field!r}; {there}; name the field that "
            f"holds the text (--text_field) or rename it to {field!r}"
        )


def _lines(file: str, meter: Meter | None) -> Iterator[bytes]:
    before = meter.done if meter is not None else 0
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(open(file, "rb"))
            stream: Any = raw
            if file.endswith(".gz"):
                stream = stack.enter_context(gzip.open(raw, "rb"))
            elif file.endswith(".zst"):
                stream = stack.enter_context(_unpack_zst(raw))
            for number, line in enumerate(stream):
                if meter is not None and number % 64 == 0:
                    meter.done = before + raw.tell()
                yield line
            if meter is not None:
                meter.done = before + os.path.getsize(file)
    except EOFError as error:
        raise SourceError(f"{file!r} ends in the middle (truncated gzip); copy it again") from error
    except (OSError, zlib.error) as error:
        if "runcated" in str(error):
            raise SourceError(f"{file!r} ends in the middle (truncated zst); copy it again") from (
                error
            )
        raise SourceError(f"{file!r} cannot be read ({error}); copy it again or mend it") from error


def _unpack_zst(raw: Any) -> io.BufferedReader:
    """A stream of the unpacked bytes; it raises at a frame that is cut short."""
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)  # type: ignore[arg-type]


# ---- parquet


def parquet_files(path: str) -> list[str]:
    """The .parquet file, or those of a folder or pattern, sorted."""
    return files_of(path, (".parquet",))


def parquet_documents(
    path: str, ledger: Ledger, *, field: str = "text", meter: Meter | None = None
) -> Iterator[Document]:
    """Reads one document a row, a few hundred rows at a time; the other columns are not read.

    A row without a value, or with bytes that are not UTF-8, is dropped and counted.

    Raises:
        SourceError: no parquet file, no such column, or a column of another type.
    """
    import pyarrow
    import pyarrow.parquet

    for file in parquet_files(path):
        source, number = os.path.basename(file), 0
        before = meter.done if meter is not None else 0
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                _check_column(file, table.schema_arrow, field)
                rows = max(1, table.metadata.num_rows)
                for batch in table.iter_batches(_READ_AT_ONCE, columns=[field]):
                    # As bytes: a column that says it is text may hold anything.
                    column = batch.column(0).cast(pyarrow.large_binary())
                    for value in column:
                        number += 1
                        data = value.as_py()
                        if data is None:
                            ledger.drop(f"no text in field {field!r}")
                            continue
                        try:
                            text = data.decode("utf-8")
                        except UnicodeDecodeError:
                            ledger.drop("not UTF-8")
                            continue
                        yield Document(name=f"{source}:{number}", text=text, source=source)
                    if meter is not None:
                        meter.done = before + os.path.getsize(file) * number // rows
        except (OSError, pyarrow.ArrowException) as error:
            what = " ".join(str(error).split())[:160]
            raise SourceError(
                f"{file!r} cannot be read as parquet ({what}); copy it again or mend it"
            ) from error
        if meter is not None:
            meter.done = before + os.path.getsize(file)


def _check_column(file: str, schema: Any, field: str) -> None:
    import pyarrow

    if field not in schema.names:
        raise SourceError(
            f"{file!r} has no column {field!r}; its columns are {', '.join(schema.names)}; name "
            "the one that holds the text (--text_field)"
        )
    kind, types = schema.field(field).type, pyarrow.types
    if not (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    ):
        raise SourceError(
            f"column {field!r} of {file!r} holds {kind}, not text; name another (--text_field)"
        )


# ---- ArrayRecord, and TFDS


def arrayrecord_documents(
    path: str,
    ledger: Ledger,
    *,
    field: str = "text",
    split: str = "train",
    meter: Meter | None = None,
) -> Iterator[Document]:
    """Reads the records of a dataset that TFDS wrote, or of plain .array_record files.

    Args:
        path: the folder of a TFDS dataset (with dataset_info.json), read through
            `tfds.data_source`; or .array_record files, whose records are JSON objects.
        ledger: gets what is no document.
        field: the feature, or the key, that holds the text.
        split: of the TFDS dataset.
        meter: told how far reading is.
    """
    if os.path.exists(os.path.join(path, "dataset_info.json")):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(path)
        yield from _data_source_documents(builder, path, split, ledger, field, meter)
        return
    for file in arrayrecord_files(path):
        yield from _json_documents(file, _records(file, meter), ledger, field)


def arrayrecord_files(path: str) -> list[str]:
    """The files of a TFDS dataset, or the .array_record file(s) of a folder or pattern, sorted."""
    if os.path.exists(os.path.join(path, "dataset_info.json")):
        return sorted(
            f for f in glob.glob(os.path.join(glob.escape(path), "*")) if os.path.isfile(f)
        )
    return files_of(path, (".array_record",))


def _records(file: str, meter: Meter | None) -> Iterator[bytes]:
    from array_record.python import array_record_module

    before, size = meter.done if meter is not None else 0, os.path.getsize(file)
    with _says_torn(file):
        reader = array_record_module.ArrayRecordReader(file)
        length = reader.num_records()
    for start in range(0, length, _READ_AT_ONCE):
        stop = min(start + _READ_AT_ONCE, length)
        with _says_torn(file):
            records = reader.read(list(range(start, stop)))
        if meter is not None:
            meter.done = before + size * stop // length
        yield from records
    with _says_torn(file):
        reader.close()  # Only here does it say that the file had no end.


@contextlib.contextmanager
def _says_torn(file: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, IndexError, OSError) as error:
        what = " ".join(str(error).split())[:160]
        raise SourceError(
            f"{file!r} is torn, or no ArrayRecord file ({what}); copy it again"
        ) from error


def tfds_builder(name: str) -> Any:
    """The TFDS builder `name` (registered, or in the TFDS data folder); SourceError if unknown."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name)
    except Exception as error:  # TFDS raises its own kinds, and ImportErrors of a builder.
        lines = str(error).strip().splitlines()
        raise SourceError(
            f"no TFDS builder {name!r} ({lines[0] if lines else type(error).__name__}); if it is "
            "your own, name the module that registers it (--module)"
        ) from error


def tfds_documents(
    name: str,
    ledger: Ledger,
    *,
    field: str = "text",
    split: str = "train",
    meter: Meter | None = None,
) -> Iterator[Document]:
    """Reads one split of a TFDS builder; it is downloaded and prepared if it is not there yet."""
    import tensorflow_datasets as tfds

    builder = tfds_builder(name)
    if not builder.is_prepared():
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            builder.download_and_prepare(file_format="array_record", download_config=config)
        except Exception as error:
            what = " ".join(str(error).split())[:160] or type(error).__name__
            raise SourceError(f"TFDS builder {name!r} cannot be prepared ({what})") from error
    yield from _data_source_documents(builder, name, split, ledger, field, meter)


def _data_source_documents(
    builder: Any, name: str, split: str, ledger: Ledger, field: str, meter: Meter | None
) -> Iterator[Document]:
    """Documents of one split of a prepared TFDS dataset, in the order of its records."""
    splits, features = builder.info.splits or {}, builder.info.features
    if split.partition("[")[0] not in splits:
        raise SourceError(f"{name!r} has no split {split!r}; it has {', '.join(splits) or 'none'}")
    if field not in (features or {}):
        raise SourceError(
            f"{name!r} has no feature {field!r}; it has {', '.join(features or {})}; name the one "
            "that holds the text (--text_field)"
        )
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise SourceError(
            f"{name!r} was prepared in a format without random access; prepare it again with "
            "file_format='array_record' (or remove it: it is then prepared so)"
        ) from error
    origin = builder.info.full_name  # Not the path: a dataset may be moved.
    if meter is not None:
        meter.total, meter.unit = len(source), " documents"
    for start in range(0, len(source), _READ_AT_ONCE):
        stop = min(start + _READ_AT_ONCE, len(source))
        for number, example in enumerate(source.__getitems__(list(range(start, stop))), start):
            value = example[field]
            try:
                text = value.decode("utf-8") if isinstance(value, bytes) else value
            except UnicodeDecodeError:
                ledger.drop("not UTF-8")
                continue
            if not isinstance(text, str):
                kind = type(value).__name__
                raise SourceError(
                    f"feature {field!r} of {name!r} holds {kind}, not text; name another "
                    "(--text_field)"
                )
            if meter is not None:
                meter.done = number + 1
            yield Document(name=f"{split}:{number}", text=text, source=origin)
