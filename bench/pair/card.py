"""The model card of the bundled pair, rendered from what was measured.

Owns: the card's words and tables.
Does not know: how anything was measured; it is a pure function of the results.
"""

from __future__ import annotations

from typing import Any

from tasks import FAMILIES, GRADES, HELD_OUT_FAMILY

_WHAT = {
    "add": "sum of two numbers (grade 1: two digits and one; then two, three, four digits)",
    "subtract": "difference of two numbers, of the same sizes",
    "largest": "the largest of 2, 2, 3, 5 numbers, often with equal leading digits",
    "reverse": "a word backwards (up to 4, 6, 9, 14 letters)",
    "sort": "a word's letters in order (up to 3, 5, 8, 12 letters)",
    "count": "how often a letter stands in a word (up to 5, 8, 12, 18 letters)",
    "pick": "the n-th letter from the left or right (up to 4, 6, 9, 14 letters)",
    "shift": "each letter moved on in the alphabet (by 1, 1, up to 3, up to 5)",
    "lookup": "who has what, from a table in the prompt (2, 4, 6, 8 rows)",
    "follow": "the number behind a name, through 0, 1, 2, 3 other names",
    "brackets": "the brackets that close a text (up to 4, 7, 11, 16 symbols)",
    "dedupe": "a word without its repeated letters (up to 4, 6, 9, 14 letters)",
}


def _percent(cell: dict[str, Any]) -> str:
    return f"{100 * cell['accuracy']:.0f} ({100 * cell['low']:.0f}-{100 * cell['high']:.0f})"


def _accuracy_table(tiers: dict[str, Any], families: list[str]) -> str:
    cells = {
        (tier, cell["family"], cell["grade"]): cell
        for tier, measured in tiers.items()
        for cell in measured["cells"]
    }
    head = "| family | tier | " + " | ".join(f"grade {grade}" for grade in GRADES) + " |"
    lines = [head, "|---" * (2 + len(GRADES)) + "|"]
    for family in families:
        for tier in tiers:
            row = " | ".join(_percent(cells[tier, family, grade]) for grade in GRADES)
            lines.append(f"| {family} | {tier} | {row} |")
    return "\n".join(lines)


def _mean_table(tiers: dict[str, Any]) -> str:
    lines = ["| tier | " + " | ".join(f"grade {grade}" for grade in GRADES) + " |"]
    lines.append("|---" * (1 + len(GRADES)) + "|")
    for tier, measured in tiers.items():
        means = []
        for grade in GRADES:
            of_grade = [
                cell["accuracy"]
                for cell in measured["cells"]
                if cell["grade"] == grade and cell["family"] in FAMILIES
            ]
            means.append(f"{100 * sum(of_grade) / len(of_grade):.1f}")
        lines.append(f"| {tier} | " + " | ".join(means) + " |")
    return "\n".join(lines)


def _shape_table(tiers: dict[str, Any]) -> str:
    lines = [
        (
            "| tier | parameters | hidden | layers | heads / kv | intermediate | padded vocabulary "
            "| tied | files |"
        ),
        "|---" * 9 + "|",
    ]
    for tier, measured in tiers.items():
        config = measured["config"]
        lines.append(
            f"| {tier} | {measured['num_params']:,} | {config['hidden_size']} "
            f"| {config['num_hidden_layers']} "
            f"| {config['num_attention_heads']} / {config['num_key_value_heads']} "
            f"| {config['intermediate_size']} | {config['vocab_size']} "
            f"| {'yes' if config['tie_word_embeddings'] else 'no'} "
            f"| {measured['num_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def _training_table(tiers: dict[str, Any]) -> str:
    lines = [
        "| tier | steps | conversations | tokens | workers | wall time | peak learning rate |",
        "|---" * 7 + "|",
    ]
    for tier, measured in tiers.items():
        record = measured["training"]
        num_conversations = record["step"] * record["examples_per_step"]
        lines.append(
            f"| {tier} | {record['step']} | {num_conversations:,} | {record['num_tokens']:,} "
            f"| {record['workers']} | {record['elapsed_s'] / 60:.0f} min "
            f"| {record['recipe']['matrix_lr']} |"
        )
    return "\n".join(lines)


def render_card(result: dict[str, Any]) -> str:
    """The card in Markdown, from what `pair/evaluate.py` measured."""
    tiers = result["tiers"]
    ratio = tiers["strategic"]["num_params"] / tiers["tactical"]["num_params"]
    num_tasks = max(cell["num_tasks"] for cell in tiers["tactical"]["cells"])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    what = "\n".join(
        f"| {name} | {_WHAT[name]} | {len(family.templates)} |"
        for name, family in {**FAMILIES, HELD_OUT_FAMILY.name: HELD_OUT_FAMILY}.items()
    )
    return f"""# The bundled pair: demo-tactical and demo-strategic

Two small language models that this project trained itself, so that the daemon can be tried, tested
and demonstrated on real models without a download and without a GPU.
They show that the machinery works.
**They are no statement about the quality of Qwen2.5 or of any other model**: they share the Qwen2
architecture and nothing else, know nothing but the tasks below, and their accuracies say nothing
about a 0.5B or a 7B model.

## What they are
The strategic model has {ratio:.2f} times the tactical one's parameters, about the nominal size
relation of a 7B to a 0.5B model (Qwen2.5's exact counts are 15.4 to 1).
Both use one tokenizer (byte-level BPE of 500 tokens, ChatML) but different padded vocabularies, as
the real pair does: ids from 500 up mean nothing, so cut logits to the tokenizer's length before
comparing distributions.

{_shape_table(tiers)}

Every digit, capital letter and bracket is one token; all 256 bytes are tokens; text is put into
normal form C first, as Qwen2's tokenizer does.
Weights are bfloat16 safetensors in the Hugging Face layout.

## What they were trained on
Questions in plain English with exact answers, drawn by `bench/pair/tasks.py`:
{len(FAMILIES)} families, four grades of difficulty, at least eight wordings each.
No other text was used.
One family, `{HELD_OUT_FAMILY.name}`, was kept out of training altogether.
A hash of what a question asks (not of its wording) decides whether it belongs to training (85 %),
validation (5 %) or test (10 %), so no test question was trained on in any wording; operands that
commute count as one question.
About 8 % of the conversations carried a system prompt and 8 % a second turn.

| family | what is asked | wordings |
|---|---|---|
{what}

## How they were trained
`python bench/pair/train.py` trains tokenizer and models from nothing on a CPU, from a seed.
The tactical model starts at random.
The strategic one is grown out of the trained tactical one (`bench/pair/growth.py`): it starts as
the same function with room to spare, and the two are therefore more alike than two models trained
apart.
Muon for the matrices inside layers, AdamW for the rest; loss on answers only; matrix products in
bfloat16, parameters in float32.
Part of the conversations were drills, which ask many small questions about one context at once
(`bench/pair/drills.py`).
The schedule and the mix of tasks were changed several times while these very models were in
training, at checkpoints; the script holds them as they ended up, so it repeats the same data and
the same learning rates, but not the same roundings.
Wall times were taken on a machine whose 2 cores other work was using too, so they are upper bounds.

{_training_table(tiers)}

In a trial of 500 steps of 128 conversations the tactical model reached a mean validation accuracy
of 26 % with Muon and of 12 % with AdamW (one run each, the same learning rate).

## Accuracy
Share of exact answers in percent, with 95 % Wilson intervals, on up to {num_tasks} different test
questions a cell.
One user turn, no system prompt, greedy decoding by `transformers` in float32 from the shipped
bfloat16 weights.
Measured on {result["date"]}, {result["machine"]}; {versions}.
Every number, with counts, is in `bench/results/pair_accuracy.json`; `python bench/pair/evaluate.py`
measures them again and writes this card.

Mean over the {len(FAMILIES)} trained families:

{_mean_table(tiers)}

{_accuracy_table(tiers, list(FAMILIES))}

The family that neither model has seen:

{_accuracy_table(tiers, [HELD_OUT_FAMILY.name])}

## Limits
- `count`, `lookup` and `follow` were not learnt properly in the time given, by neither model.
  A guess among the values that stand in the question scores 50, 29, 18, 13 in `lookup` and
  33, 33, 25, 20 in `follow` (grades 1 to 4): `lookup` and grades 1 and 4 of `follow` are about
  that, grades 2 and 3 of `follow` above it; `count` hardly falls with the number of letters.
  Drills did not change that; `pick` was learnt with them. On these three families the strategic
  model is no better than the tactical one.
- They answer the questions above in the wordings above, punctuation included: "What is 12 plus 30"
  without its question mark is likely to be answered wrongly. Any other text gets a wrong or an
  empty answer, and so does a question that refers to an earlier turn.
- Operands are capital letters and digits. Sizes beyond grade 4 were neither trained nor measured.
- Conversations in training stayed under about 200 tokens; `max_position_embeddings` is 2048 so that
  long contexts can be run, not because they were learnt.
"""
