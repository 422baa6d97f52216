"""A tiny Qwen2.5-VL for the demo: its tokenizer, its processor, its random weights (about one million)."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from . import world

CONTEXT = 512  # tokens
INIT = 0.08  # about 1/sqrt(hidden size): with the usual 0.02 so small a model stays blind for long
MEDIA = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _corpus() -> list[str]:
    """Every sentence form of the world with every word: enough for each word to become one token."""
    text = [*world.QUESTION.values(), "Options: A. B. C. D.", "user\nassistant\n"]
    for words in zip(list(world.COLOURS) * 3, world.SHAPES * 4, list(world.DIRECTIONS) * 3, strict=True):
        text += [phrasing.format(*words) for phrasing in world.PHRASINGS]
        text += [form.format(*words) for form in world.CHAIN.values()]
        text += [f"A. {words[0]} B. {words[1]} C. {words[2]}"]
    return text * 4


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the world's sentences; digits and punctuation stand alone.

    The tags are ordinary added tokens, the media and chat markers special ones.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\d|\s+|[^\sA-Za-z\d]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=480,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *MEDIA],
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.add_tokens(list(TAGS))
    return tokenizer


def build_processor() -> Qwen2_5_VLProcessor:
    """The real Qwen2-VL processors, told to leave 56 x 56 frames as they are."""
    size = {"shortest_edge": world.SIZE**2, "longest_edge": world.SIZE**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=True),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2_5_VLProcessor, *, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights; 3 text layers of 128, 2 vision layers of 96."""
    tokenizer = processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in MEDIA}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": CONTEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    config.initializer_range = config.text_config.initializer_range = (
        config.vision_config.initializer_range
    ) = INIT
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config)
