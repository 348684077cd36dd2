"""CORE once more, from its definition alone: one question at a time, one whole forward pass a prompt, plain loops.

It shares no code with `cheaptrain.evaluate.core`; tests compare the two.
"""

import random

import torch


def shuffled(rows):
    rows = list(rows)
    random.Random(1337).shuffle(rows)
    return rows


def asked(kind, rows, index, shots, delimiter, model, tokenizer, context):
    """(predicted, mean losses, cropped tokens): predicted is a choice, or whether the continuation is greedy."""
    others = [place for place in range(len(rows)) if place != index]
    drawn = [rows[place] for place in random.Random(1234 + index).sample(others, shots)]
    head = ""
    for shot in drawn:
        if kind == "multiple_choice":
            head += shot["query"] + delimiter + shot["choices"][shot["gold"]]
        elif kind == "schema":
            head += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"]
        else:
            head += shot["context"].strip() + delimiter + shot["continuation"]
        head += "\n\n"

    row = rows[index]
    if kind == "multiple_choice":
        texts = [head + row["query"] + delimiter + choice for choice in row["choices"]]
    elif kind == "schema":
        texts = [head + option + delimiter + row["continuation"] for option in row["context_options"]]
    else:
        whole = head + row["context"].strip() + delimiter
        texts = [whole.strip(), whole + row["continuation"]]
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [[begin, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]

    if kind == "language_modeling":
        short, long = ids
        assert long[: len(short)] == short and len(long) > len(short)
        losses, greedy, cropped = forward(model, long, len(short), context)
        return bool(greedy), [losses], cropped

    if kind == "multiple_choice":
        same = 0
        while same < min(map(len, ids)) and all(each[same] == ids[0][same] for each in ids):
            same += 1
        starts = [same for _ in ids]
    else:
        same = 0
        while same < min(map(len, ids)) and all(each[-1 - same] == ids[0][-1 - same] for each in ids):
            same += 1
        starts = [len(each) - same for each in ids]
    results = [forward(model, each, start, context) for each, start in zip(ids, starts, strict=True)]
    means = [loss for loss, _, _ in results]
    return means.index(min(means)), means, max(crop for _, _, crop in results)


@torch.no_grad()
def forward(model, ids, start, context):
    cropped = max(0, len(ids) - context)
    ids, start = ids[cropped:], start - cropped
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    losses, greedy = [], True
    for place in range(start, len(ids)):
        said = model.lm_head(hidden[place - 1]).float()  # what comes at `place` is said one before it
        losses.append(-said.log_softmax(-1)[ids[place]].item())
        greedy = greedy and said.argmax().item() == ids[place]
    return (sum(losses) / len(losses) if losses else float("nan")), greedy, cropped
