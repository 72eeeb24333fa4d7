"""Rows 10-13: windows that are shifted and merged, pooled attention, class tokens, nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.failures.checks import prune
from tests.failures.test_shape_operators import images


# ---------------------------------------------------------------------- 10
def _swin_huggingface() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return SwinForImageClassification(config)


def _swin_torchvision(version: int) -> nn.Module:
    from torchvision.models.swin_transformer import (
        PatchMerging,
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlock,
        SwinTransformerBlockV2,
    )

    block, merging = [(SwinTransformerBlock, PatchMerging), (SwinTransformerBlockV2, PatchMergingV2)][version - 1]
    return SwinTransformer(
        [2, 2], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.1, num_classes=5, block=block,
        downsample_layer=merging,
    )  # fmt: skip


#: What to prune, and the globs of what goes into and comes out of merging four patches into one.
SWIN = {
    "huggingface": (
        _swin_huggingface,
        "swin.encoder.layers.0.downsample.reduction.weight",
        "*.[qkvo]_proj.weight.[01]",
    ),
    "torchvision": (lambda: _swin_torchvision(1), "features.2.reduction.weight", "*.attn.qkv.weight.[01]"),
    "torchvision_v2": (lambda: _swin_torchvision(2), "features.2.reduction.weight", "*.attn.qkv.weight.[01]"),
}


@pytest.mark.parametrize(("name", "macs"), [("huggingface", 0.3), ("torchvision", 0.5), ("torchvision_v2", 0.5)])
def test_row_10_swin(name: str, macs: float) -> None:
    """Merging concatenates four strided slices of an image. TP#258, #349, #490."""
    build, merging, projections = SWIN[name]
    result = prune(build(), images(size=32), target={"macs": macs})
    result.cut(f"{merging}.[01]", projections)
    # The width of the first stage, four times.
    first = next(n for n, p in result.model.named_parameters() if p.dim() == 4)
    assert result.width(merging, 1) == 4 * result.width(first)
    kinds = result.kinds
    assert kinds["heads"] == 4 and kinds["channels"] + kinds["hidden"] >= 2 + 4


# ---------------------------------------------------------------------- 11
def _mvit_torchvision() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(1, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
        MSBlockConfig(4, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 1, 1]),
    ]
    return MViT(
        (16, 16), 4, blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
        proj_after_attn=True, num_classes=5, patch_embed_kernel=(3, 3, 3),
        patch_embed_stride=(2, 2, 2), patch_embed_padding=(1, 1, 1),
    )  # fmt: skip


def _mvit_timm() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    config = MultiScaleVitCfg(depths=(1, 2), embed_dim=(16, 32), num_heads=(2, 4))
    return MultiScaleVit(config, (32, 32), num_classes=5)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_row_11_mvit_v2(library: str) -> None:
    """Depthwise convolutions over the head dimensions pool queries, keys and values. TP#287."""
    model, inputs = (
        (_mvit_timm(), images(size=32)) if library == "timm" else (_mvit_torchvision(), torch.randn(2, 3, 4, 16, 16))
    )
    result = prune(model, inputs)
    # A single head cannot be cut: torchvision's first block has one.
    assert (result.kinds["heads"], result.kinds["head_dims"]) == (3 if library == "timm" else 2, 3)
    result.cut("*.qkv.weight.[01]", "*.mlp.*.weight.[01]", "*pool_[qkv]*.weight.0", "*rel_pos_[hw].1")
    result.whole("picked by index", "*rel_pos_[hw].0")


# ---------------------------------------------------------------------- 12
class OldAttention(nn.Module):
    """As timm wrote it years ago: the head width is an attribute, made from the number of heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).reshape(n, t, c))


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm.create_model(name, **(sizes | options))


def _old_timm() -> nn.Module:
    model = _timm("vit_tiny_patch16_224")
    for block in model.blocks:
        block.attn = OldAttention(48, 4)
    return model


def _fuse(model: nn.Module, fused: bool) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def _registers() -> nn.Module:
    return _timm("vit_tiny_patch16_224", reg_tokens=3, class_token=False, global_pool="avg")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", ["deit_tiny", "distilled", "vit_with_norms", "vit_of_old"])
def test_row_12_vit_and_deit(name: str, fused: bool) -> None:
    """Views of the head width are right however a version writes them down. TP#340, #105, #446, #101."""
    build = {
        "deit_tiny": lambda: _timm("deit_tiny_patch16_224"),
        "distilled": lambda: _timm("deit_tiny_distilled_patch16_224"),
        "vit_with_norms": lambda: _timm("vit_tiny_patch16_224", qk_norm=True, init_values=0.1, qkv_bias=False),
        "vit_of_old": _old_timm,
    }[name]
    model = build()
    _fuse(model, fused)
    result = prune(model, images(size=32))
    kinds = result.kinds
    assert (kinds["heads"], kinds["head_dims"], kinds["channels"], kinds["hidden"]) == (2, 2, 1, 2)
    result.cut("blocks.*.attn.qkv.weight.[01]", "blocks.*.attn.proj.weight.[01]", "blocks.*.mlp.*.weight.[01]")
    result.cut("patch_embed.proj.weight.0", "pos_embed.2", "*norm.weight.0", "head.weight.1")
    assert result.width("pos_embed", 1) == model.pos_embed.shape[1]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_row_12_register_tokens(fused: bool) -> None:
    """Register tokens are no width of anything: their number stays, and the same groups are found either way."""
    model = _registers()
    _fuse(model, fused)
    result = prune(model, images(size=32))
    result.cut("reg_token.2", "blocks.*.attn.qkv.weight.[01]", "blocks.*.attn.proj.weight.[01]")
    assert result.width("reg_token", 1) == 3


# ---------------------------------------------------------------------- 13
class Multihead(nn.Module):
    """Self- or cross-attention by torch's own module between two linear layers."""

    def __init__(self, attention: nn.MultiheadAttention, memory: int | None, mask: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.memory = None if memory is None else nn.Linear(6, memory)
        self.attention = attention
        self.mask = mask
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        memory = x if self.memory is None else self.memory(x[..., :6])
        mask = nn.Transformer.generate_square_subsequent_mask(10) if self.mask else None
        y, _ = self.attention(x, memory, memory, attn_mask=mask, need_weights=self.mask)
        y = self.head(x + y)
        return y if self.attention.batch_first else y.transpose(0, 1)


MULTIHEAD: dict[str, Any] = {
    "batch_first": lambda: Multihead(nn.MultiheadAttention(32, 4, batch_first=True), None),
    "batch_second": lambda: Multihead(nn.MultiheadAttention(32, 4), None),
    "no_bias": lambda: Multihead(nn.MultiheadAttention(32, 4, bias=False, batch_first=True), None),
    "masked_with_weights": lambda: Multihead(nn.MultiheadAttention(32, 4, batch_first=True), None, mask=True),
}


@pytest.mark.parametrize("name", MULTIHEAD)
def test_row_13_multihead_attention(name: str) -> None:
    """Heads and what is inside them are cut apart from the width of the residual stream. TP#196."""
    result = prune(MULTIHEAD[name](), torch.randn(2, 10, 6))
    assert result.kinds == {"hidden": 1, "heads": 1, "head_dims": 1}
    result.cut("attention.in_proj_weight.[01]", "attention.out_proj.weight.[01]", "embed.weight.0", "head.weight.1")
    kept = {g.kind: g.kept for g in result.pruned.report.groups}
    assert result.width("attention.out_proj.weight", 1) % kept["heads"] == 0
    assert result.width("attention.out_proj.weight", 0) == kept["hidden"]


class Cross(nn.Module):
    """Queries of one width look at keys and values of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 32), nn.Linear(6, 20), nn.Linear(6, 24)
        self.attention = nn.MultiheadAttention(32, 4, kdim=20, vdim=24, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.attention(self.query(x), self.key(memory), self.value(memory), need_weights=False)[0])


def test_row_13_cross_attention_of_other_widths() -> None:
    """Separate projections, and a bias among the keys and values. TP#196, fasterai#29."""
    result = prune(Cross(), (torch.randn(2, 7, 6), torch.randn(2, 9, 6)))
    result.cut("attention.[qkv]_proj_weight.[01]", "attention.out_proj.weight.[01]", "attention.bias_[kv].2")
    result.cut("query.weight.0", "key.weight.0", "value.weight.0", "head.weight.1")
    assert result.kinds["heads"] == 1


def test_row_13_transformer_encoder_and_decoder() -> None:
    """torch's own layers, whose fast path is another code than their slow one. TP#196."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 32)
            self.net = nn.Transformer(32, 4, 1, 1, 48, batch_first=True)
            self.head = nn.Linear(32, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.net(self.embed(x), self.embed(y)))

    result = prune(Both(), (torch.randn(2, 9, 6), torch.randn(2, 7, 6)))
    assert result.kinds["heads"] == 3
    result.cut("*.in_proj_weight.[01]", "*.out_proj.weight.[01]", "*.linear[12].weight.[01]", "*norm?.weight.0")


class Similarities(nn.Module):
    """What CLIP thinks of each pair; its other results are the widths of both towers, which would stay whole."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        return self.clip(input_ids=ids, pixel_values=pixels).logits_per_image


def _clip() -> tuple[nn.Module, Tensor, Tensor]:
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    image = {"image_size": 32, "patch_size": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CLIPModel(CLIPConfig(text_config=text | sizes, vision_config=image | sizes, projection_dim=24))
    ids = torch.randint(3, 50, (2, 9))
    ids[:, -1] = 2
    return model, ids, images(size=32)


def test_row_13_clip() -> None:
    """Not only the linear layers of both towers: patches, tokens, positions, norms and projections too. TP#507."""
    model, ids, pixels = _clip()
    result = prune(Similarities(model), (ids, pixels))
    assert result.kinds["heads"] == 4 and result.kinds["hidden"] >= 4
    result.cut("*.[qkv]_proj.weight.[01]", "*.out_proj.weight.[01]", "*.fc[12].weight.[01]", "*.class_embedding.0")
    result.cut("*.token_embedding.weight.1", "*.position_embedding.weight.1", "*.patch_embedding.weight.0")
    result.cut("*_projection.weight.1", "*norm*.weight.0")
    # The common space costs next to nothing: whether it is cut is the budget's affair, that it can be is what matters.
    assert "clip.visual_projection.weight.0" in {g.name for g in result.pruned.report.groups}


def test_row_13_clip_with_all_results() -> None:
    """What a model returns keeps its width, and the report says so; heads and hidden units do not."""
    model, ids, pixels = _clip()
    result = prune(model, {"input_ids": ids, "pixel_values": pixels})
    result.cut("*.[qkv]_proj.weight.0", "*.out_proj.weight.1", "*.fc1.weight.0", "*.fc2.weight.1")
    result.whole("of a model output", "*.fc2.weight.0", "*.patch_embedding.weight.0", "*.token_embedding.weight.1")
