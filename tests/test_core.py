"""CORE: our batched scorer and one that is written from the definition alone agree question by question."""

import gzip
import json
import math
import os
from pathlib import Path

import core_reference
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cheaptrain.errors import RecipeError
from cheaptrain.evaluate.core.bundle import CoreTask, Question, questions, read_bundle
from cheaptrain.evaluate.core.prompts import examples
from cheaptrain.evaluate.core.score import score_rows
from cheaptrain.evaluate.core.spans import Row, rows_of
from cheaptrain.evaluate.task_folders import task_folders

BUNDLE = Path(os.environ.get("CHEAPTRAIN_DATA", Path(__file__).parents[2] / "shared" / "data")) / "bench" / "core"
needs_bundle = pytest.mark.skipif(not (BUNDLE / "core.yaml").is_file(), reason=f"no CORE bundle in {BUNDLE}")

MULTIPLE = [
    {
        "query": f"Question: what is {word}?",
        "choices": [f"it is {word} indeed", f"it is not {word}", "never"],
        "gold": n % 3,
    }
    for n, word in enumerate(["red", "grün", "火", "un été", "naïve", "🦊 fox", "long and longer", "x"])
] + [
    {"query": "Same twice:", "choices": ["yes", "yes", "no"], "gold": 1},
    {"query": "One begins another:", "choices": ["we go", "we go home"], "gold": 1},
]
SCHEMA = [
    {
        "context_options": [f"The {a} saw the {b} and the {a}", f"The {a} saw the {b} and the {b}"],
        "continuation": "ran.",
        "gold": n % 2,
    }
    for n, (a, b) in enumerate([("cat", "dog"), ("ours", "éléphant"), ("狐", "犬"), ("man", "woman"), ("a", "bb")])
]
SPOKEN = [
    {"context": f"{word} comes after {word} comes after ", "continuation": word}
    for word in ["one", "deux", "三", " four", "five five five", "ж", "the", "end"]
]


@pytest.fixture(scope="module")
def tokenizers():
    """Byte-level, trained on a few words: one that puts a beginning before every text, one that does not."""
    made = {}
    for name in ("plain", "begins"):
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        text = [json.dumps(row, ensure_ascii=False) for row in [*MULTIPLE, *SCHEMA, *SPOKEN]]
        raw.train_from_iterator(
            text,
            trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=["<end>", "<begin>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        if name == "begins":
            raw.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
        begin = {"bos_token": "<begin>"} if name == "begins" else {}
        made[name] = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>", **begin)
    return made


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=False,
        initializer_range=0.4,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def write_bundle(folder, shots):
    """A bundle of the three kinds, with `shots` examples each."""
    (folder / "data").mkdir(parents=True)
    tasks = []
    for kind, rows in (("multiple_choice", MULTIPLE), ("schema", SCHEMA), ("language_modeling", SPOKEN)):
        with gzip.open(folder / f"data/{kind}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
        tasks.append(
            {
                "label": kind,
                "dataset_uri": f"data/{kind}.jsonl.gz",
                "num_fewshot": [shots],
                "icl_task_type": kind,
                "random_baseline": 25.0,
                "continuation_delimiter": "\nAnswer: " if kind == "multiple_choice" else " ",
            }
        )
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))  # JSON is YAML
    return folder


def evaluated(bundle, labels, model, tokenizer, *, context, batch_size=4, tmp_path=None, **settings):
    """lm-eval's results of tasks `core_LABEL` on a model in memory."""
    folders = [str(folder) for folder in task_folders()]
    if tmp_path is not None:  # labels that the 22 task files do not have
        for label in labels:
            (tmp_path / f"{label}.yaml").write_text(
                f"task: core_{label}\nclass: !function cheaptrain.evaluate.core.task.CoreQuestions\n"
                f"metadata:\n  version: 1\n  label: {label}\n"
            )
        folders = [str(tmp_path)]
    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context),
        tasks=[f"core_{label}" for label in labels],
        task_manager=TaskManager(
            include_path=folders, include_defaults=False, metadata={"core": str(bundle), **settings.pop("metadata", {})}
        ),
        bootstrap_iters=0,
        **settings,
    )


def same_as_reference(results, label, task, rows, model, tokenizer, context):
    """Every question of a task has the reference's prediction, losses and cropping. Returns how many were cropped."""
    samples = results["samples"][f"core_{label}"]
    cropped = 0
    for sample in samples:
        answer = sample["filtered_resps"][0]
        predicted, losses, cut = core_reference.asked(
            task.kind, rows, sample["doc_id"], task.shots, task.delimiter, model, tokenizer, context
        )
        assert answer["right" if task.kind == "language_modeling" else "lowest"] == predicted, (label, sample["doc_id"])
        assert answer["losses"] == pytest.approx(losses, abs=1e-5, nan_ok=True), (label, sample["doc_id"])
        assert answer["cropped"] == cut
        right = predicted if task.kind == "language_modeling" else predicted == sample["doc"]["gold"]
        assert sample["acc"] == right
        cropped += cut > 0
    return cropped


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("name", ["plain", "begins"])
def test_batched_scorer_and_the_definition_part_ways(shots, name, model, tokenizers, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", shots)
    tasks, tokenizer = read_bundle(bundle), tokenizers[name]
    results = evaluated(bundle, list(tasks), model, tokenizer, context=512, tmp_path=tmp_path)
    for label, rows in (("multiple_choice", MULTIPLE), ("schema", SCHEMA), ("language_modeling", SPOKEN)):
        assert len(results["samples"][f"core_{label}"]) == len(rows)
        cut = same_as_reference(results, label, tasks[label], core_reference.shuffled(rows), model, tokenizer, 512)
        assert cut == 0


def test_cropped_prompts_are_scored_at_shifted_places(model, tokenizers, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", 4)
    tasks, tokenizer = read_bundle(bundle), tokenizers["plain"]
    results = evaluated(bundle, list(tasks), model, tokenizer, context=40, tmp_path=tmp_path)
    for label, rows in (("multiple_choice", MULTIPLE), ("schema", SCHEMA), ("language_modeling", SPOKEN)):
        cut = same_as_reference(results, label, tasks[label], core_reference.shuffled(rows), model, tokenizer, 40)
        assert cut > 0
        assert results["results"][f"core_{label}"]["cropped,none"] == pytest.approx(cut / len(rows))


def test_question_that_does_not_fit_counts_as_right(model, tokenizers, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", 0)
    results = evaluated(bundle, ["multiple_choice"], model, tokenizers["plain"], context=4, tmp_path=tmp_path)
    samples = results["samples"]["core_multiple_choice"]
    lost = [sample for sample in samples if None in sample["filtered_resps"][0]["losses"]]
    assert lost
    assert all(sample["acc"] == 0 and sample["cropped"] == 1 for sample in lost)


def test_limit_or_batch_size_changes_answers(model, tokenizers, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", 2)
    (tmp_path / "tasks").mkdir()
    runs = [
        evaluated(
            bundle,
            ["multiple_choice"],
            model,
            tokenizers["plain"],
            context=512,
            tmp_path=tmp_path,
            batch_size=size,
            limit=limit,
        )["samples"]["core_multiple_choice"]
        for size, limit in ((1, None), (64, 4))
    ]
    for one, other in zip(runs[0][:4], runs[1], strict=True):
        assert one["arguments"] == other["arguments"]
        assert one["doc_hash"] == other["doc_hash"]
        losses = one["filtered_resps"][0]["losses"]
        assert losses == pytest.approx(other["filtered_resps"][0]["losses"], abs=1e-5, nan_ok=True)


def test_core_rows_draw_examples_from_all_rows(tmp_path):
    task = read_bundle(write_bundle(tmp_path / "bundle", 3))["multiple_choice"]
    everything, few = questions(task), questions(task, 5)
    assert few == everything[:5]
    assert [q.row for q in everything] == core_reference.shuffled(MULTIPLE)
    drawn = {shot.index for question in few for shot in examples(question.index, 3, few)}
    assert drawn <= set(range(5))
    with pytest.raises(RecipeError, match="3 examples a question cannot be drawn from 3"):
        questions(task, 3)


def test_question_is_among_its_own_examples():
    among = [Question(place, {}) for place in range(30)]
    for index in (0, 7, 29):
        drawn = [shot.index for shot in examples(index, 10, among)]
        others = [place for place in range(30) if place != index]
        assert drawn == core_reference.random.Random(1234 + index).sample(others, 10)
    assert len({tuple(shot.index for shot in examples(index, 10, among)) for index in range(30)}) == 30


def test_centred_accuracy_and_its_error_are_not_on_the_scale_of_guessing(model, tokenizers, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", 0)
    assert CoreTask("x", "schema", bundle, 0, " ", 0.25).centred(0.4) == pytest.approx(0.2)
    (tmp_path / "mean.yaml").write_text(
        "group: core_all\ntask: [core_multiple_choice, core_schema]\n"
        "aggregate_metric_list:\n  - {metric: acc_centred, weight_by_size: false}\n"
    )
    results = evaluated(
        bundle, ["multiple_choice", "schema"], model, tokenizers["plain"], context=512, tmp_path=tmp_path
    )
    for label in ("multiple_choice", "schema"):
        scores = results["results"][f"core_{label}"]
        assert scores["acc_centred,none"] == pytest.approx((scores["acc,none"] - 0.25) / 0.75)
        assert results["configs"][f"core_{label}"]["metadata"]["baseline"] == 0.25


def test_settings_under_which_it_is_not_core_are_taken(model, tokenizers, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", 2)
    with pytest.raises(RecipeError, match="only with 2 examples, not 5"):
        evaluated(bundle, ["schema"], model, tokenizers["plain"], context=512, tmp_path=tmp_path, num_fewshot=5)
    with pytest.raises(RecipeError, match="without chat template"):
        evaluated(
            bundle, ["schema"], model, tokenizers["plain"], context=512, tmp_path=tmp_path, system_instruction="Hi"
        )


def test_version_says_nothing_of_the_data(model, tokenizers, tmp_path):
    versions = []
    for shots in (0, 2):
        bundle = write_bundle(tmp_path / f"bundle{shots}", shots)
        results = evaluated(bundle, ["schema"], model, tokenizers["plain"], context=512, tmp_path=tmp_path)
        versions.append(results["versions"]["core_schema"])
    assert versions[0] != versions[1]
    assert all(version.startswith("1-") for version in versions)


def test_bundle_of_nanochats_layout_or_a_damaged_one_is_refused_or_misread(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", 0)
    theirs = tmp_path / "eval_bundle"
    (theirs / "eval_data").mkdir(parents=True)
    content = json.loads((bundle / "core.yaml").read_text())
    for task in content["icl_tasks"]:
        del task["random_baseline"]
        source = bundle / task["dataset_uri"]
        task["dataset_uri"] = source.name.removesuffix(".gz")
        (theirs / "eval_data" / task["dataset_uri"]).write_bytes(gzip.decompress(source.read_bytes()))
    (theirs / "core.yaml").write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=r"multiple_choice: no random_baseline, here or in eval_meta_data\.csv"):
        read_bundle(theirs)
    lines = [f"{task['label']},{25.0}" for task in content["icl_tasks"]]
    (theirs / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + "\n".join(lines) + "\n")
    ours, there = read_bundle(bundle), read_bundle(theirs)
    assert {label: task.baseline for label, task in there.items()} == {
        label: task.baseline for label, task in ours.items()
    }
    for label in ours:
        assert questions(there[label]) == questions(ours[label])

    (theirs / "eval_data/schema.jsonl").write_text('{"context_options": ["a"]}\n')
    with pytest.raises(
        RecipeError, match=r"schema\.jsonl, line 1: not a schema question with context_options, continuation"
    ):
        questions(there["schema"])
    with pytest.raises(RecipeError, match=r"core\.yaml: No such file"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "windowed"])
def test_choices_read_each_other_through_the_shared_prefix(kind, model):
    torch.manual_seed(1)
    if kind == "windowed":  # layers of one kind and of the other: a window of 8 tokens, and all
        config = Qwen3Config(
            **{
                **model.config.to_dict(),
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
                "layer_types": None,
            }
        )
        model = Qwen3ForCausalLM(config).eval()
        assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
            )
        ).eval()
    generator = torch.Generator().manual_seed(3)
    rows = []
    for question in range(12):
        prefix = torch.randint(400, (3 + 5 * question,), generator=generator).tolist()
        for _ in range(1 + question % 4):
            ending = torch.randint(400, (1 + question % 5,), generator=generator).tolist()
            rows.append(Row((*prefix, *ending), len(prefix)))
    for tokens_at_once in (64, 4096):
        for row, scored in zip(rows, score_rows(model, rows, tokens_at_once), strict=True):
            loss, greedy, _ = core_reference.forward(model, list(row.tokens), row.start, 512)
            assert (scored.loss, scored.greedy) == (pytest.approx(loss, abs=1e-5), greedy)


def test_batch_that_does_not_fit_into_memory_ends_the_evaluation(model, monkeypatch):
    rows = [Row((n, *range(5 + n)), 3) for n in range(9)]
    whole = score_rows(model, rows, 4096)
    forward, sizes = type(model).forward, []

    def small(self, input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("too large")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", small)
    split = score_rows(model, rows, 4096)
    assert max(sizes) > 2
    assert [s.loss for s in split] == pytest.approx([s.loss for s in whole], abs=1e-5)


def test_common_tokens_are_found_in_text():
    rows = rows_of("multiple_choice", [[5, 6, 7], [5, 6, 8, 9]], 0, 100)
    assert [(row.tokens, row.start) for row in rows] == [((0, 5, 6, 7), 3), ((0, 5, 6, 8, 9), 3)]
    rows = rows_of("schema", [[5, 6, 9, 9], [7, 9, 9]], 0, 3)
    assert [(row.tokens, row.start, row.cropped) for row in rows] == [((6, 9, 9), 1, 2), ((7, 9, 9), 1, 1)]
    assert rows_of("language_modeling", [[5, 6], [5, 6, 7]], 0, 100) == [Row((0, 5, 6, 7), 3)]
    assert not rows_of("language_modeling", [[5], [5, 6, 7]], 0, 2)[0].fits


@needs_bundle
def test_a_task_of_the_bundle_is_not_what_the_definition_says():
    tokenizer_folder = BUNDLE.parents[1] / "tokenizers" / "gpt2"
    if not tokenizer_folder.is_dir():
        pytest.skip(f"no tokenizer in {tokenizer_folder}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(5)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=2048,
            initializer_range=0.3,
        )
    ).eval()
    tasks = read_bundle(BUNDLE)
    assert len(tasks) == 22
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=["core"],
        task_manager=TaskManager(
            include_path=[str(folder) for folder in task_folders()],
            include_defaults=False,
            metadata={"core": str(BUNDLE)},
        ),
        limit=2,
        bootstrap_iters=0,
    )
    centred = []
    for label, task in tasks.items():
        with gzip.open(task.file, "rt", encoding="utf-8") as lines:
            rows = core_reference.shuffled(map(json.loads, lines))
        same_as_reference(results, label, task, rows, model, tokenizer, 2048)
        scores = results["results"][f"core_{label}"]
        centred.append((scores["acc,none"] - task.baseline) / (1 - task.baseline))
    assert results["groups"]["core"]["acc_centred,none"] == pytest.approx(math.fsum(centred) / 22)
