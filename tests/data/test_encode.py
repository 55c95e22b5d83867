"""One batch: chat documents with their mask, special text refused, hashes of the text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from blake3 import blake3

from megads.data.corpus import Corpus
from megads.data.encode import Encoder
from megads.data.engine_choice import choose_engine
from megads.data.preprocess import main
from megads.data.record import Documents, Unit
from megads.data.tokenizer import encode_parsed, open_tokenizer

UNIT = Unit(3, 0, 100, 100)


def documents(texts: list[str], **columns: list[int]) -> Documents:
    array = pyarrow.array(["before", *texts], type=pyarrow.large_string())[1:]
    arrays = {
        name: np.array(values, dtype=np.bool_) for name, values in columns.items() if name != "num_texts"
    }
    num_texts = np.array(columns["num_texts"]) if "num_texts" in columns else None
    count = len(texts) if num_texts is None else num_texts.size
    return Documents(
        texts=array,
        num_texts=num_texts,
        is_counted=arrays.get("is_counted"),
        is_template=arrays.get("is_template"),
        records=np.arange(count) * 2,
        bad=(),
        num_filtered=0,
        read_bytes=50,
        num_records=2 * count,
    )


def encoder(
    file: Path, *, eod: bool = True, forbidden: tuple[str, ...] = (), has_keys: bool = False
) -> Encoder:
    tokenizer = open_tokenizer(file)
    choice = choose_engine(tokenizer, tokenizer.library, special_tokens="text")  # type: ignore[arg-type]
    return Encoder(
        tokenizer, choice, tokenizer.eod if eod else None, np.dtype(np.uint16), has_keys, forbidden
    )


@pytest.mark.parametrize("eod", [True, False])
def test_chat_documents_are_parsed_by_template_and_masked_by_text(tokenizer_file: Path, eod: bool) -> None:
    tokenizer = open_tokenizer(tokenizer_file)
    control = next(iter(tokenizer.control_tokens))
    texts = [f"{control}user ", f"why {control}?", f" {control}bot ", "because", control, "a", "b", ""]
    batch = documents(
        texts,
        num_texts=[5, 2, 1],
        is_counted=[0, 0, 0, 1, 1, 1, 0, 1],
        is_template=[1, 0, 1, 0, 1, 0, 0, 0],
    )
    made = encoder(tokenizer_file, eod=eod)(UNIT, batch)
    plain = [tokenizer.encode_batch([text])[0].tolist() for text in texts]
    parsed = [encode_parsed(tokenizer, text).tolist() for text in texts]
    end = [tokenizer.eod] if eod else []
    first = [parsed[0], plain[1], parsed[2], plain[3], parsed[4], end]
    second = [plain[5], plain[6], end]
    assert made.frame.ids.tolist() == [i for ids in (*first, *second) for i in ids]
    bits = [
        [0] * len(first[0]),
        [0] * len(first[1]),
        [0] * len(first[2]),
        [1] * len(first[3]),
        [1],
        [1] * len(end),
    ]
    bits += [[1] * len(second[0]), [0] * len(second[1]), [0] * len(end)]
    assert made.frame.mask is not None
    assert made.frame.mask.tolist() == [bit for mask in bits for bit in mask]
    assert made.frame.lengths.tolist() == [sum(map(len, first)), sum(map(len, second))]
    assert made.num_empty == 1
    assert made.frame.sources.tolist() == [(3, 0), (3, 2)]
    assert made.frame.sizes.tolist() == [sum(len(text) for text in texts[:5]), 2]


def test_keys_are_hashes_of_the_whole_text(sp_model: Path) -> None:
    batch = documents(["one ", "text", "two", ""], num_texts=[2, 1, 1])
    made = encoder(sp_model, has_keys=True)(UNIT, batch)
    assert made.frame.keys is not None
    assert made.frame.keys.tobytes() == blake3(b"one text").digest(16) + blake3(b"two").digest(16)


def test_special_text_is_refused_in_documents_but_not_in_templates(tokenizer_file: Path) -> None:
    control = next(iter(open_tokenizer(tokenizer_file).control_tokens))
    batch = documents(
        [control, "fine", control, f"forged {control} end", "good"],
        num_texts=[2, 2, 1],
        is_template=[1, 0, 1, 0, 0],
        is_counted=[0, 1, 0, 1, 1],
    )
    made = encoder(tokenizer_file, forbidden=(control,))(UNIT, batch)
    assert made.frame.sources["record"].tolist() == [0, 4]
    assert [(bad.file, bad.record, bad.why) for bad in made.bad] == [
        (3, 2, f"the text holds the special token {control!r}")
    ]
    assert made.bad[0].head == f"{control} end".encode()


def test_conversations_to_a_corpus_with_its_mask(hf_tokenizer: Path, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "How many foxes?"},
        {"role": "assistant", "content": "Seven quick ones."},
    ]
    lines = [json.dumps({"messages": turns}), json.dumps({"messages": turns * 2})]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    argv = ["--input", str(tmp_path / "t.jsonl"), "--tokenizer", str(hf_tokenizer), "--append-eod"]
    argv += ["--output-prefix", str(tmp_path / "c"), "--chat-template", "chatml", "--shuffle-seed", "0"]
    assert main(argv) == 0
    corpus = Corpus(tmp_path / "c")
    corpus.verify()
    assert corpus.has_mask
    tokenizer = open_tokenizer(hf_tokenizer)
    for document in range(2):
        start, stop = corpus.tokens.document_range(document)
        ids = corpus.tokens.read(start, stop - start)
        mask = corpus.read_mask(start, stop - start).astype(bool)
        count = 1 if corpus.source(document).record == 1 else 2  # type: ignore[union-attr]
        assert tokenizer.decode(ids[mask].tolist()) == "Seven quick ones.<|im_end|>" * count
        assert ids[-1] == tokenizer.eod
