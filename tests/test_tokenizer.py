"""A tokenizer keeps its fingerprint through saving, knows its tokens' bytes, and never lets text become a command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prepare_helpers import prepare, quiet, recipe, said, save_tokenizer, text, write_jsonl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cheaptrain.data.encode import Encoder
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.data.tokenizer import load_tokenizer, open_tokenizer
from cheaptrain.data.train_tokenizer import SPECIAL_TOKENS
from cheaptrain.errors import PreflightError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"


def shared(name: str) -> str:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    return str(SHARED / name)


def trained(root: Path, **train: object) -> object:
    write_jsonl(root / "a.jsonl", range(60))
    spec = {"train": {"vocab_size": 400, "sources": ["tok"], **train}}
    sources = [{"files": str(root / "a.jsonl")}, {"name": "tok", "weight": 0.0, "packages": "argparse"}]
    return recipe(root, *sources, tokenizer=spec)


def test_fingerprint_survives_saving_and_loading(tmp_path: Path) -> None:
    folders = [str(save_tokenizer(tmp_path / "own"))]
    folders += [str(SHARED / name) for name in ("gpt2", "smollm2-instruct") if (SHARED / name).is_dir()]
    for number, folder in enumerate(folders):
        tokenizer = open_tokenizer(folder)
        hf = AutoTokenizer.from_pretrained(folder)
        hf("some text", truncation=True, max_length=2, padding="max_length") if hf.pad_token else hf("some text")
        hf.padding_side = "left"
        hf.chat_template = "{{ messages }}"
        hf.save_pretrained(tmp_path / f"saved{number}")
        again = open_tokenizer(str(tmp_path / f"saved{number}"))
        assert again.fingerprint == tokenizer.fingerprint
        hf.add_tokens(["<<12x34>>"])
        hf.save_pretrained(tmp_path / f"grown{number}")
        grown = open_tokenizer(str(tmp_path / f"grown{number}"))
        assert grown.fingerprint != tokenizer.fingerprint and grown.size == tokenizer.size + 1


def test_end_of_text_is_part_of_the_fingerprint_and_must_exist(tmp_path: Path) -> None:
    folder = str(save_tokenizer(tmp_path / "t"))
    plain, other = open_tokenizer(folder), open_tokenizer(folder, end_of_text="<|im_start|>")
    assert (plain.eot_id, other.eot_id) == (0, 1) and plain.fingerprint != other.fingerprint
    with pytest.raises(PreflightError, match=r"'<eot>' is not one token"):
        open_tokenizer(folder, end_of_text="<eot>")
    without = str(save_tokenizer(tmp_path / "without", eos_token=None))
    with pytest.raises(PreflightError, match=r"no end-of-text token.*tokenizer\.end_of_text"):
        open_tokenizer(without)
    assert open_tokenizer(without, end_of_text="<|endoftext|>").fingerprint == plain.fingerprint


@pytest.mark.parametrize("name", ["own", "gpt2", "smollm2-instruct"])
def test_token_bytes_add_up_to_the_bytes_of_any_text(tmp_path: Path, name: str) -> None:
    tokenizer = open_tokenizer(str(save_tokenizer(tmp_path / "t")) if name == "own" else shared(name))
    table = tokenizer.token_bytes()
    assert table.shape == (tokenizer.size,) and table.dtype == np.int32
    assert table[list(tokenizer.special_ids)].sum() == 0
    sample = "Ελληνικά naïve 🙂 \u200b\t\n  12345 <|endoftext|> the quick\r\n" * 3
    ids, lengths = Encoder(tokenizer.encoder_spec()).encode([sample, "x"])
    assert table[ids[: lengths[0]].astype(int)].sum() == len(sample.encode())


@pytest.mark.parametrize("name", ["own", "gpt2", "smollm2-instruct"])
def test_plain_text_gets_the_ids_transformers_gives(tmp_path: Path, name: str) -> None:
    tokenizer = open_tokenizer(str(save_tokenizer(tmp_path / "t")) if name == "own" else shared(name))
    texts = [text(i) for i in range(20)] + ["  leading", "trailing \n", "a\u0301 1234"]
    ids, lengths = Encoder(tokenizer.encoder_spec()).encode(texts)
    expected = tokenizer.hf(texts, add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [token for document in expected for token in [*document, tokenizer.eot_id]]
    assert lengths.tolist() == [len(document) + 1 for document in expected]


def sentencepiece_like(folder: Path) -> str:
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "é", "t", "h", "e"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocabulary += ["th", "the"]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", [("<s>", 1), ("</s>", 2)])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    hf.save_pretrained(folder)
    return str(folder)


def test_sentencepiece_like_tokenizer_gets_one_beginning_one_end_and_right_bytes(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(sentencepiece_like(tmp_path / "sp"))
    assert (tokenizer.bos_id, tokenizer.eot_id) == (1, 2)
    texts = ["the the é ☃", "</s> the"]
    ids, lengths = Encoder(tokenizer.encoder_spec()).encode(texts)
    table = tokenizer.token_bytes()
    start = 0
    for item, length in zip(texts, lengths.tolist(), strict=True):
        document = ids[start : start + length].tolist()
        assert document[0] == 1 and document[-1] == 2 and not {1, 2} & {*document[1:-1]}
        assert table[document].sum() == len(item.encode())
        start += length
    assert start == len(ids)


def test_added_words_are_found_in_text_and_special_ones_are_not(tmp_path: Path) -> None:
    hf = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "t"))
    hf.add_tokens([AddedToken("<<7x8>>", normalized=False), AddedToken("<|stop|>", normalized=False)])
    hf.save_pretrained(tmp_path / "grown")
    tokenizer = open_tokenizer(str(tmp_path / "grown"), end_of_text="<|stop|>")  # not flagged special by its author
    ids, _ = Encoder(tokenizer.encoder_spec()).encode(["<<7x8>> then <|stop|>"])
    ids = ids.tolist()
    assert ids[0] == hf.convert_tokens_to_ids("<<7x8>>")
    assert ids.count(tokenizer.eot_id) == 1 and ids[-1] == tokenizer.eot_id
    assert tokenizer.token_bytes()[ids].sum() == len("<<7x8>> then <|stop|>")


def test_a_model_that_holds_a_special_token_as_a_word_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]").save_pretrained(
        tmp_path / "w"
    )
    encoder = Encoder(open_tokenizer(str(tmp_path / "w")).encoder_spec())
    assert encoder.encode(["a b"])[0].tolist() == [1, 2, 0]
    with pytest.raises(PreflightError, match=r"turns plain text into its special token '</s>'.*'a </s>'"):
        encoder.encode(["a", "a </s>"])


def test_wide_vocabulary_is_stored_in_four_bytes() -> None:
    from cheaptrain.data.encode import EncoderSpec

    assert EncoderSpec("", (), 0, None, 2**16).dtype.itemsize == 2
    assert EncoderSpec("", (), 0, None, 2**16 + 1).dtype.itemsize == 4


def test_training_is_the_same_in_every_process_and_notices_changed_text(tmp_path: Path) -> None:
    asked = trained(tmp_path)
    with pytest.raises(PreflightError, match="cheaptrain prepare"):
        load_tokenizer(asked.tokenizer, asked.data)  # type: ignore[attr-defined]
    prepare_recipe(asked, console=quiet())  # type: ignore[arg-type]
    tokenizer = load_tokenizer(asked.tokenizer, asked.data)  # type: ignore[attr-defined]
    assert tokenizer.size == 400 and tokenizer.bos_id is None
    assert tokenizer.hf.convert_ids_to_tokens(list(tokenizer.special_ids)) == SPECIAL_TOKENS
    (folder,) = (path for path in (tmp_path / "data" / "tokenizers").iterdir() if path.is_dir())
    model = (folder / "tokenizer.json").read_bytes()
    shutil.rmtree(folder)
    script = (
        "import sys; from cheaptrain.recipe.schema import Recipe; from cheaptrain.data.prepare import prepare_recipe\n"
        "prepare_recipe(Recipe.model_validate_json(sys.argv[1]))"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "5", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", script, asked.model_dump_json()], env=environment, check=True)  # type: ignore[attr-defined]
    assert (folder / "tokenizer.json").read_bytes() == model
    other = trained(tmp_path, vocab_size=401)
    with pytest.raises(PreflightError, match="cheaptrain prepare"):
        load_tokenizer(other.tokenizer, other.data)  # type: ignore[attr-defined]


def test_tokenizer_trained_on_changed_files_is_trained_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(60))
    spec = {"train": {"vocab_size": 340, "sources": ["source0"], "max_bytes": 5000}}
    asked = recipe(tmp_path, {"files": str(path)}, tokenizer=spec)
    prepare_recipe(asked, console=quiet())
    first = load_tokenizer(asked.tokenizer, asked.data)
    path.write_text(path.read_text().replace("jumps", "wanders"))
    console = quiet()
    (manifest,) = prepare_recipe(asked, console=console)
    second = load_tokenizer(asked.tokenizer, asked.data)
    assert first.fingerprint != second.fingerprint and manifest.settings["tokenizer"] == second.fingerprint
    assert "training 340 tokens" in said(console) and "tokenizer: " in said(console)


def test_too_little_text_gives_a_smaller_vocabulary_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc abc abc")
    spec = {"train": {"vocab_size": 5000, "sources": ["source0"]}}
    console = quiet()
    asked = recipe(tmp_path, {"files": str(tmp_path / "a.txt")}, tokenizer=spec, validation=0.0)
    prepare_recipe(asked, console=console)
    assert "asked for 5,000" in said(console)
    assert load_tokenizer(asked.tokenizer, asked.data).size < 300


def test_slow_missing_and_broken_tokenizers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreflightError, match="no such folder"):
        open_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PreflightError, match=r"needs tokenizer\.json"):
        open_tokenizer(str(tmp_path / "empty"))
    folder = save_tokenizer(tmp_path / "t")

    class Slow:
        is_fast = False

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: Slow())
    with pytest.raises(PreflightError, match=r"slow .*Slow"):
        open_tokenizer(str(folder))


def test_another_tokenizer_is_another_folder_and_training_is_told(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", range(20)))
    first, _ = prepare(tmp_path, {"files": path})
    hf = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    hf.add_tokens(["fox"])
    hf.save_pretrained(tmp_path / "tokenizer")
    second, printed = prepare(tmp_path, {"files": path})
    assert "tokenizer: " in printed and first.directory != second.directory
    assert second.train.tokens < first.train.tokens or text(0).count("fox") == 0
