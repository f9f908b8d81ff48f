"""The tokenizer of the bundled pair: byte-level BPE of 500 tokens with a ChatML template.

Owns: how text is cut. Every digit, capital letter and punctuation mark is one token, whatever
stands around it, so operands look the same everywhere; merges are learnt on the lower-case English
of the tasks. All 256 bytes are tokens, so any text in normal form C round-trips.
Does not know: the models' padded vocabularies.

The normal form and the splitting rule at run time are those of Qwen2, because `AutoTokenizer` puts
`Qwen2Tokenizer` in place for this architecture whatever `tokenizer_config.json` names. The merges
are learnt under a stricter rule, and no merge crosses what that rule separates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from tasks import task_at
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

NUM_TOKENS = 500
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Give the answer only.", "Answer in one word.")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# A capital, a digit, a mark or one white space stands alone; a lower-case word keeps its space.
_PIECES = r"\p{N}|\p{Lu}| ?\p{Ll}+|\s|."
_NUM_CORPUS_TASKS = 20_000


def _corpus(seed: int) -> Iterator[str]:
    """What the merges are learnt on: training tasks, and what the chat template adds to them."""
    for index in range(_NUM_CORPUS_TASKS):
        task = task_at(seed, index, "train")
        yield task.prompt
        yield f"{task.answer}\nuser\nassistant\nsystem"
        yield SYSTEM_PROMPTS[index % len(SYSTEM_PROMPTS)]


def train_tokenizer(seed: int) -> Qwen2Tokenizer:
    """Learn the merges (about two seconds) and wrap them the way `AutoTokenizer` loads them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = learnt["vocab"]
    vocab |= {token: len(vocab) + place for place, token in enumerate(SPECIAL_TOKENS)}
    assert len(vocab) == NUM_TOKENS, "the corpus has too few words to merge"
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in learnt["merges"]],
        unk_token=None,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
