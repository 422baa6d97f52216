"""A Hugging Face model seen as: embeddings, positions, decoder, head. The model object is never changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raise_core.scoring.packing import Pack
from raise_core.scoring.prompts import GRIDS, IMAGE, PIXELS, VIDEO, MediaTokens, Prompt
from raise_core.scoring.sharding import Shards
from raise_core.scoring.tree_attention import TreeMask, dense_mask

FAMILIES = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}  # whose media are merged here
T = TypeVar("T")
LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, eq=False)
class VisionFeatures:
    """What the vision tower made of one prompt's media: rows in the order of its placeholders.

    rows [n, D]; deep: one [n, D] for each early decoder layer that adds them again (Qwen3-VL), else empty.
    """

    rows: Tensor
    deep: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Head:
    """z = cap(scale * (hidden @ weight.T + bias)), with cap(x) = softcap * tanh(x / softcap).

    weight [V, D], bias [V] or None. `options()` are the keywords of `linear_token_stats`,
    `linear_policy_loss` and `confidence_rewards`.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def z(self, logits: Tensor) -> Tensor:
        """What the model samples from: hidden @ weight.T + bias after scale and softcap."""
        scaled = logits * self.logit_scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def options(self) -> dict[str, Any]:
        """weight, bias, logit_scale and softcap by name."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }


class Backbone:
    """The parts of a causal or image-text-to-text model that scoring runs; the head's forward never is.

    why_plain: why groups cannot be packed with this model, None when they can. window: length of its sliding
    attention window in tokens, None without one: a longer sequence cannot be packed either.
    """

    def __init__(self, model: nn.Module) -> None:
        given: Any = model
        hf = given.get_base_model() if hasattr(given, "get_base_model") else given
        core = getattr(hf, "base_model", hf)
        if core is hf or not hasattr(hf, "get_output_embeddings"):
            raise TypeError(
                f"model: got {type(model).__name__}, wanted a Hugging Face model with a language head, such "
                "as AutoModelForCausalLM or AutoModelForImageTextToText gives"
            )
        self.model, self.core = hf, core
        self.decoder = getattr(core, "language_model", core)
        self._shards = Shards(model, self.decoder)
        self.config = hf.config.get_text_config()
        self.family = hf.config.model_type in FAMILIES
        self.media = _media_tokens(hf.config) if self.family else MediaTokens()
        self.attention = getattr(self.config, "_attn_implementation", None)
        self.window = _window(self.config)
        self._takes = inspect.signature(core.forward).parameters
        self.why_plain = self._why_plain()

    def _why_plain(self) -> str | None:
        """The first thing that stands in the way of a packed group."""
        name = type(self.model).__name__
        takes = inspect.signature(self.decoder.forward).parameters
        kinds = set(getattr(self.config, "layer_types", None) or ()) - LAYERS
        if self.decoder is not self.core and not self.family:
            return f"{name} merges its media in a way of its own"
        if kinds:
            return f"{name} has {', '.join(sorted(kinds))} layers, which see the tokens one after another"
        if not {"position_ids", "attention_mask", "past_key_values", "inputs_embeds"} <= takes.keys():
            return f"{name} does not take the positions of its tokens"
        if not hasattr(self.decoder, "rotary_emb") or not self.layers:
            return f"{name} has no rotary positions"
        bidirectional = getattr(self.config, "use_bidirectional_attention", None)
        if bidirectional or not getattr(self.config, "is_causal", True):
            return f"{name} looks ahead"
        if self.attention not in ("sdpa", "eager"):
            return f'its attention is {self.attention!r}; load it with attn_implementation="sdpa"'
        return None

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        found = [list(m) for m in self.decoder.children() if isinstance(m, nn.ModuleList)]
        return max(found, key=len, default=[])

    @property
    def device(self) -> torch.device:
        """Where its embeddings are."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def cacheable(self) -> bool:
        """Whether keys and values may be kept: transformers drops them under gradient checkpointing."""
        return not any(
            getattr(m, "gradient_checkpointing", False) and m.training for m in self.decoder.modules()
        )

    @property
    def width(self) -> int:
        """Multiplications of a token in one layer's matrices, in units of one attention pair's."""
        weights = sum(p.numel() for p in self.layers[0].parameters())
        heads = int(self.config.num_attention_heads)
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        return int(weights // (2 * heads * size))

    def head(self) -> Head:
        """The language head as it is now. Raises TypeError for one that is more than a matrix.

        Under FSDP2 its weights are gathered, and stay so until the next backward pass.
        """
        layer = self.model.get_output_embeddings()
        if layer is None or hasattr(layer, "base_layer") or getattr(layer, "weight", None) is None:
            raise TypeError(
                f"model: its language head is {type(layer).__name__}, wanted a plain linear layer; merge an "
                "adapter on the head, or leave the head out of the adapter"
            )
        self._shards.gather_head(layer)
        scaling = getattr(self.config, "logits_scaling", None)
        scale = 1.0 / scaling if scaling else getattr(self.config, "logit_scale", None)
        return Head(
            layer.weight,
            getattr(layer, "bias", None),
            1.0 if scale is None else float(scale),
            getattr(self.config, "final_logit_softcapping", None),
        )

    def forward_pass(self, work: Callable[[], T]) -> T:
        """`work()`, with the weights of a model under FSDP2 gathered for calls of its parts.

        Without gradient it leaves no weights that autocast has cast: under FSDP2 a later pass with gradient
        would take them and lose the weights' gradients.
        """
        result = self._shards.forward_pass(self.model.get_input_embeddings(), work)
        if not torch.is_grad_enabled():
            torch.clear_autocast_cache()
        return result

    def positions(self, prompt: Prompt, length: int) -> Tensor:
        """Rotary positions [R, length] of the prompt and the text that follows; R is 3, or 1 for text models.

        From the model's own `get_rope_index` of the whole sequence: after a video, text continues from the
        spatial extent, so neither lengths nor maxima give them. Ids play no part in them, kinds do.
        """
        if not self.family:
            return torch.arange(length)[None]
        room = (0, length - len(prompt))
        kinds = nn.functional.pad(prompt.kinds, room)
        inputs = {
            k: v.cpu() if isinstance(v, Tensor) else v
            for k, v in prompt.inputs.items()
            if k in (*GRIDS.values(), "second_per_grid_ts")
        }
        ids = nn.functional.pad(prompt.ids, room)
        found: Tensor = self.core.get_rope_index(ids[None], mm_token_type_ids=kinds[None].int(), **inputs)[0]
        return found[:, 0]

    def vision_features(
        self, prompts: Sequence[Prompt], max_tokens: int = 32768
    ) -> list[VisionFeatures | None]:
        """Features of each prompt's media, None without any; pixels that several share are encoded once.

        max_tokens: media tokens in one pass of the vision tower, unless one prompt has more.
        """
        got = {kind: self._encode(kind, prompts, max_tokens) for kind in (IMAGE, VIDEO)}
        features: list[VisionFeatures | None] = []
        for prompt in prompts:
            levels = [got[k][id(prompt.inputs[PIXELS[k]])] for k in (IMAGE, VIDEO) if prompt.has(k)]
            if len(levels) < 2:
                features.append(VisionFeatures(levels[0][0], tuple(levels[0][1:])) if levels else None)
                continue
            kinds = prompt.kinds[prompt.kinds > 0].to(levels[0][0].device)[:, None]
            merged = [
                image.new_zeros(len(kinds), image.shape[1])
                .masked_scatter(kinds == IMAGE, image)
                .masked_scatter(kinds == VIDEO, video)
                for image, video in zip(*levels, strict=True)
            ]
            features.append(VisionFeatures(merged[0], tuple(merged[1:])))
        return features

    def _encode(self, kind: int, prompts: Sequence[Prompt], max_tokens: int) -> dict[int, list[Tensor]]:
        """By identity of the pixels: rows for the embeddings, then for each deep level."""
        inputs = {id(p.inputs[PIXELS[kind]]): p.inputs for p in prompts if p.has(kind)}
        tokens = [
            int(torch.as_tensor(i[GRIDS[kind]]).prod(-1).sum()) // self.media.patches for i in inputs.values()
        ]
        found: dict[int, list[Tensor]] = {}
        for piece in _pieces(tokens, max_tokens):
            keys = list(inputs)[piece]
            found |= zip(keys, self._encode_piece(kind, [inputs[k] for k in keys]), strict=True)
        return found

    def _encode_piece(self, kind: int, inputs: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
        """One pass of the vision tower: for each of these inputs its levels."""
        self._shards.gather()
        pixels = torch.cat([i[PIXELS[kind]] for i in inputs]).to(self.device)
        grids = [torch.as_tensor(i[GRIDS[kind]]) for i in inputs]
        encode = self.core.get_image_features if kind == IMAGE else self.core.get_video_features
        out = encode(pixels, torch.cat(grids).to(self.device))
        media = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
        levels = [_regroup(list(level), [len(g) for g in grids]) for level in media]
        return [list(own) for own in zip(*levels, strict=True)]

    def embed(self, prompt: Prompt, features: VisionFeatures | None) -> Tensor:
        """Input embeddings [L, D] of a prompt, media in their places."""
        rows: Tensor = self.model.get_input_embeddings()(prompt.ids.to(self.device))
        if features is None:
            return rows
        places = (prompt.kinds > 0).to(self.device)[:, None]
        return rows.masked_scatter(places, features.rows.to(rows.device, rows.dtype))

    def embed_text(self, ids: Sequence[int]) -> Tensor:
        """Embeddings [n, D] of text; a media placeholder among them is text as well."""
        rows: Tensor = self.model.get_input_embeddings()(torch.tensor(list(ids), device=self.device))
        return rows

    def run(
        self,
        pack: Pack,
        prompts: Sequence[Prompt],
        features: Sequence[VisionFeatures | None],
        positions: dict[int, Tensor],
        cache: Any = None,
        jitter: float = 0.0,
    ) -> Tensor:
        """Hidden states [queries, D] of a pack, with gradient.

        positions: by prompt, [R, n] with n at least the longest path. The cache is extended.
        jitter: relative noise on the embeddings, to see what roundings of that size come to.
        """
        self._shards.gather()
        queried = pack.nodes[pack.layout.cached :]
        embeds = [
            self.embed(prompts[n.prompt], features[n.prompt]) if n.ids is None else self.embed_text(n.ids)
            for n in queried
        ]
        where = [positions[n.prompt][:, n.first : n.first + n.length] for n in queried]
        inputs_embeds = torch.cat(embeds)[None]
        if jitter:
            noise = torch.rand(inputs_embeds.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
            nudged = inputs_embeds.float() * (1 + jitter * noise.to(self.device))
            inputs_embeds = nudged.to(inputs_embeds.dtype)
        position_ids = torch.cat(where, 1).to(self.device)
        out = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=self._mask(pack, inputs_embeds),
            position_ids=position_ids[:, None] if self.family else position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            **_deep(pack, prompts, features, self.device),
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _mask(self, pack: Pack, inputs_embeds: Tensor) -> Tensor | None:
        """None where every token sees all before it, which is the model's own rule."""
        layout = pack.layout
        if layout.parents == tuple(range(-1, len(layout.parents) - 1)):
            return None
        if self.attention == "sdpa":
            return TreeMask.of(layout, inputs_embeds.device)
        return dense_mask(layout, inputs_embeds.dtype, inputs_embeds.device)

    def plain(self, prompt: Prompt, ids: Sequence[int]) -> Tensor:
        """Hidden states [L + n, D] of [prompt | ids] by the model's own forward pass, media and all."""
        tail = torch.tensor(list(ids), dtype=torch.long)
        inputs = {k: v for k, v in prompt.inputs.items() if k in self._takes}
        if self.family:
            inputs["mm_token_type_ids"] = nn.functional.pad(prompt.kinds, (0, len(tail)))[None].int()
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] = nn.functional.pad(inputs["token_type_ids"], (0, len(tail)))
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        whole = torch.cat([prompt.ids, tail]).to(self.device)[None]
        hidden: Tensor = self.core(input_ids=whole, use_cache=False, **inputs).last_hidden_state[0]
        return hidden


def _media_tokens(config: Any) -> MediaTokens:
    merge = int(config.vision_config.spatial_merge_size)
    return MediaTokens(config.image_token_id, config.video_token_id, merge * merge)


def _window(config: Any) -> int | None:
    """The sliding window of a text config, if some layer uses it."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if window is None or (layers is not None and "sliding_attention" not in layers):
        return None
    return int(window) if getattr(config, "use_sliding_window", True) else None


def _pieces(sizes: Sequence[int], room: int) -> list[slice]:
    """Runs of neighbours that add up to at most `room`, one of them at least."""
    cuts, left = list[int](), 0
    for i, size in enumerate(sizes):
        if i == 0 or size > left:
            cuts.append(i)
            left = room
        left -= size
    return [slice(*pair) for pair in pairwise([*cuts, len(sizes)])]


def _regroup(media: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """One tensor for each medium to one for each prompt, `counts` media each."""
    parts, start = [], 0
    for count in counts:
        parts.append(torch.cat(list(media[start : start + count])))
        start += count
    return parts


def _deep(
    pack: Pack, prompts: Sequence[Prompt], features: Sequence[VisionFeatures | None], device: torch.device
) -> dict[str, Any]:
    """What Qwen3-VL's decoder adds again after its first layers, for the media of this pass."""
    queried = pack.nodes[pack.layout.cached :]
    found = [f for n in queried if n.ids is None and (f := features[n.prompt]) is not None and f.deep]
    if not found:
        return {}
    places = [
        prompts[n.prompt].kinds > 0 if n.ids is None else torch.zeros(n.length, dtype=torch.bool)
        for n in queried
    ]
    levels = zip(*(f.deep for f in found), strict=True)
    return {
        "visual_pos_masks": torch.cat(places)[None].to(device),
        "deepstack_visual_embeds": [torch.cat(level) for level in levels],
    }
