"""The tool on the folder of nasty files: exactly the documents, exactly the errors, nothing that looks finished."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megads.data.corpus import Corpus
from megads.data.preprocess import main
from megads.data.tokenizer import open_tokenizer
from tests.data.nasty import LIMIT, NASTY

BAD = {name: messages for name, (_, _, messages) in NASTY.items() if messages}


def run(folder: Path, tokenizer: Path, prefix: Path, *options: str) -> int:
    arguments = ("--input", str(folder), "--tokenizer", str(tokenizer), "--output-prefix", str(prefix))
    return main([*arguments, "--append-eod", "--max-document-bytes", str(LIMIT), *options])


@pytest.mark.parametrize("unit_bytes", [50, 1 << 20])
def test_skipping_keeps_every_document_and_lists_the_rest(
    unit_bytes: int, hf_tokenizer: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (content, _, _) in NASTY.items():
        (folder / name).write_bytes(content)
    rows = pyarrow.array(["row", None, "row"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "zz.parquet")
    options = ("--on-error", "skip", "--workers", "2", "--unit-bytes", str(unit_bytes))
    assert run(folder, hf_tokenizer, tmp_path / "c", *options) == 0

    tokenizer, corpus = open_tokenizer(hf_tokenizer), Corpus(tmp_path / "c")
    texts, places = [], []
    for number in range(corpus.num_documents):
        start, stop = corpus.tokens.document_range(number)
        ids = corpus.tokens.read(start, stop - start).tolist()
        assert ids[-1] == tokenizer.eod
        texts.append(tokenizer.decode(ids[:-1]))
        source = corpus.source(number)
        assert source is not None
        places.append((Path(source.file).name, source.record))
    assert texts == [text for _, wanted, _ in NASTY.values() for text in wanted] + ["row", "row"]
    assert places[:2] == [("a_plain.jsonl", 1), ("a_plain.jsonl", 2)]
    assert ("d_blank.json", 6) in places
    assert ("u_text.txt", 1) in places
    assert places[-1] == ("zz.parquet", 3)

    listed = [json.loads(line) for line in Path(f"{tmp_path}/c.bad.jsonl").read_text().splitlines()]
    wanted = [message for messages in BAD.values() for message in messages]
    assert len(listed) == len(wanted) + 1
    manifest = json.loads(Path(f"{tmp_path}/c.json").read_text())
    assert manifest["num_bad"] == len(listed)
    named = [message.removeprefix(f"{folder}/") for message in manifest["bad"]]
    assert named == [*wanted, "zz.parquet:2: column 'text' is null, not text"]


@pytest.mark.parametrize("name", BAD)
def test_by_default_the_first_bad_record_is_the_error(
    name: str, hf_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(NASTY[name][0])
    assert run(folder, hf_tokenizer, tmp_path / "c") == 2
    message = capsys.readouterr().err
    assert f"{folder}/{BAD[name][0]}\n  " in message
    assert "b''" not in message  # nothing found is not told as found
    assert "--on-error skip" in message
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".idx", ".json")]
