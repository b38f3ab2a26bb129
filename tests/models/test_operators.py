"""Every operator and every addition of the tables: its formula, its cost, and that it works wherever softmax does."""

import copy
import io
import math
import warnings

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from models import (
    ADDITIONS,
    OPERATORS,
    Segmenter,
    build_head,
    fingerprint,
    linear_blocks,
    linearize,
    load,
    note_image_size,
    rotary_embeddings,
    save,
    take_any_size,
    taps,
)
from models.operators import Shape, build_additions, build_operator
from models.operators.core import EPS, FEATURES, counting, wide
from models.operators.feature_maps import elu1
from tests.models import naive
from tests.support.largest import LargestTensor

EACH = [*((name, ()) for name in OPERATORS), *(("elu1", (name,)) for name in ADDITIONS)]
TOGETHER = [*((name, ()) for name in OPERATORS), ("elu1", tuple(ADDITIONS))]
EVERY_PAIR = [(operator, additions) for operator in OPERATORS for additions in ((), *((name,) for name in ADDITIONS))]
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
VITS = {
    "prefix tokens": ("vit_tiny_patch16_224", {"reg_tokens": 4, "qk_norm": True}),
    "rotary": ("vit_small_patch16_dinov3", {}),
    "rotary, positions of both kinds": ("eva02_tiny_patch14_224", {}),
}


def ids(pair):
    return "+".join((pair[0], *pair[1]))


def randomised(module, seed=0):
    """With noise in every parameter, so that none is at a start that hides it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def inputs(tokens, grad=True, dtype=torch.float64, B=2, H=3, K=8, D=12):
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, H, tokens, K)] * 3 + [(B, tokens, D)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(grad) for s in shapes]


def build(kind="prefix tokens", **kwargs):
    torch.manual_seed(0)
    name, own = VITS[kind]
    return timm.create_model(name, **{**TINY, **own, **kwargs}).eval()


def images(*size, dtype=torch.float32):
    return torch.randn(2, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(1), dtype=dtype)


# --- Formulas -------------------------------------------------------------------------------------------------------


def test_every_operator_and_addition_has_a_formula():
    assert naive.OPERATORS.keys() == OPERATORS.keys()
    assert naive.ADDITIONS.keys() == ADDITIONS.keys()


@pytest.mark.parametrize(("grid", "prefix"), [((4, 4), 0), ((3, 5), 1), ((6, 2), 5)])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_equals_the_quadratic_formula(name, grid, prefix):
    op = randomised(build_operator(name, Shape(12, 3, 8, prefix)).double())
    args = inputs(prefix + grid[0] * grid[1])
    check_equal(op(*args, grid), naive.OPERATORS[name](op, *args, grid), [*args, *op.parameters()])


@pytest.mark.parametrize("sides", [(3, 1, 7), (2, 5, 3), (32, 3, 4), (4, 3, 1)], ids=str)
def test_pooled_of_other_sides(sides):
    kwargs = dict(zip(("cells", "window", "landmark"), sides, strict=True))
    op, args = build_operator("pooled", Shape(12, 3, 8, 1), kwargs), inputs(1 + 4 * 7)
    check_equal(op(*args, (4, 7)), naive.OPERATORS["pooled"](op, *args, (4, 7)), args)


@pytest.mark.parametrize(("grid", "prefix"), [((4, 4), 0), ((3, 5), 5)])
@pytest.mark.parametrize("name", ADDITIONS)
def test_an_addition_equals_its_formula(name, grid, prefix):
    shape = Shape(12, 3, 8, prefix)
    op, add = build_operator("elu1", shape), randomised(build_additions([name], shape)[name].double())
    q, k, v, x = args = inputs(prefix + grid[0] * grid[1])
    if add.site == "queries_keys":
        out = op(*add(q, k), v, x, grid)
    elif add.site == "values":
        out = op(q, k, add(v, x, grid), x, grid)
    elif add.site == "attention":
        out = add(op(q, k, v, x, grid), q, k, v, x, grid)
    else:
        out = add(op(q, k, v, x, grid), v, x, grid)
    wanted = naive.ADDITIONS[name](add, lambda q, k, v: naive.OPERATORS["elu1"](op, q, k, v, x, grid), *args, grid)
    check_equal(out, wanted, [*args, *add.parameters()])


def check_equal(out, wanted, leaves):
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    ours, theirs = (
        torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True) for y in (out, wanted)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["elu1", "focused", "focused_learned", "hedgehog", "exp", "rala", "inline"])
def test_second_derivatives(name):
    op = randomised(build_operator(name, Shape(6, 1, 4)).double())
    args = inputs(5, B=1, H=1, K=4, D=6)
    assert gradcheck(lambda *a: op(*a, (1, 5)), args)
    assert gradgradcheck(lambda *a: op(*a, (1, 5)), args)


@pytest.mark.parametrize("power", [1, 2, 3, 5.5, 8, 16, 17])
def test_powers_by_products_and_by_logarithms(power):
    """Derivatives of the hand-written pullback too, the second ones where both ways begin."""
    op, args = build_operator("focused", Shape(12, 3, 8), {"power": power}).double(), inputs(9)
    check_equal(op(*args, (3, 3)), naive.OPERATORS["focused"](op, *args, (3, 3)), args)
    q, k, v, x = (t.float() for t in args)
    torch.testing.assert_close(op(q, k, v, x, (3, 3)), op(*args, (3, 3)).float(), rtol=1e-5, atol=1e-6)
    if power in (1, 5.5):
        assert gradgradcheck(lambda *a: op(*a, (1, 3)), inputs(3, B=1, H=1, K=4, D=6))


def test_features_of_a_subclass_do_not_take_the_derivative_of_others():
    class Halved(OPERATORS["elu1"]):
        @staticmethod
        def features(q, k):
            return elu1(q / 2), elu1(k / 2)

    args = inputs(9)
    q, k, v, x = args
    wanted = build_operator("elu1", Shape(12, 3, 8))(q / 2, k / 2, v, x, (3, 3))
    check_equal(Halved(Shape(12, 3, 8))(*args, (3, 3)), wanted, args)
    del FEATURES["Halved"]


@pytest.mark.parametrize("name", ["elu1", "relu"])
def test_vanilla_gives_what_it_gave(name):
    """In fp32: outputs to the bit, gradients to 1e-6, of features, state and quotient in plain autograd."""
    op, (q, k, v, x) = build_operator(name, Shape(12, 3, 8)), inputs(64, dtype=torch.float32)
    f, g = op.features(q, k)
    wanted = (f @ (g.transpose(-2, -1) @ v)) / (f @ g.sum(-2).unsqueeze(-1)).clamp_min(EPS)
    out = op(q, k, v, x, (8, 8))
    assert torch.equal(out, wanted) and not list(op.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (out, wanted)), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("name", OPERATORS)
def test_bf16_is_within_a_rounding_of_fp32(name):
    """Features, state and normaliser are fp32: only inputs and the output are rounded, autocast or not."""
    op = build_operator(name, Shape(12, 3, 8, 1))
    args = [t.bfloat16() for t in inputs(1 + 1024, grad=False)]
    wanted = op(*(t.float() for t in args), (32, 32))
    outs = [op.bfloat16()(*args, (32, 32))]
    with torch.autocast("cpu", torch.bfloat16):
        outs.append(op(*args, (32, 32)))
    for out in outs:
        assert out.dtype == torch.bfloat16
        assert (out - wanted).abs().max() <= 2**-7 * wanted.abs().max()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_values_and_gradients_stay_finite(name, scale):
    """Equal tokens, and such as elu + 1 makes exact zeros of."""
    op = build_operator(name, Shape(12, 3, 8, 1))
    args = [(scale * t).detach().requires_grad_() for t in inputs(17, dtype=torch.float32)]
    out = op(*args, (4, 4))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(t.grad is None or t.grad.isfinite().all() for t in (*args, *op.parameters()))


# --- Cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", EACH, ids=ids)
def test_never_makes_an_n_by_n_tensor(pair):
    largest = []
    for side in (16, 32, 64):
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=side, patch_size=1, embed_dim=4, depth=1, num_heads=1, num_classes=0,
            mlp_ratio=1, class_token=False, global_pool="avg",
        )  # fmt: skip
        with LargestTensor() as seen:
            linearize(vit, pair[0], additions=pair[1])(torch.rand(1, 3, side, side)).sum().backward()
        largest.append(seen.numel)
    assert largest[2] <= 4 * largest[1] <= 16 * largest[0] and largest[2] <= 64 * 4096


@pytest.mark.parametrize("name", ["elu1", "relu", "focused", "focused_learned", "hedgehog", "exp", "mala", "inline"])
def test_backward_keeps_q_k_v_and_the_state(name):
    """So that activation checkpointing of a block runs attention twice and not three times."""
    op, args, kept = build_operator(name, Shape(12, 3, 8)).double(), inputs(256), {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        op(*args, (16, 16))
    large = [n for n in kept.values() if n > 2 * 256 * 3 * 2]
    assert len(large) <= (4 if name in ("mala", "inline") else 3)  # these keep the output too


@pytest.mark.parametrize("pair", EACH, ids=ids)
def test_flops_are_counted_and_few(pair):
    """Forward of a block of ViT-S at 224 pixels: at most 1.25 times that of elu1."""
    kwargs = {"depth": 1, "num_classes": 0}
    counts = []
    with torch.device("meta"):
        vit = timm.create_model("vit_small_patch16_224", **kwargs)
        for operator, additions in (("elu1", ()), pair):
            with FlopCounterMode(display=False) as counter:
                linearize(vit, operator, additions=additions)(torch.empty(1, 3, 224, 224))
            counts.append(counter.get_total_flops())
    assert counts[0] <= counts[1] <= 1.25 * counts[0]


@pytest.mark.parametrize("pair", [("pooled", ()), ("focused", ("neighborhood3",))], ids=ids)
@pytest.mark.parametrize("side", [14, 16, 32, 37, 64])
def test_what_is_near_and_far_costs_little(pair, side):
    """Between the projections of attention, with a class token: at most 1.25 times what elu1 costs."""
    shape, counts = Shape(384, 6, 64, 1), []
    for name, additions in (("elu1", ()), pair):
        operator, added = build_operator(name, shape), build_additions(additions, shape)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, counting(), FlopCounterMode(display=False) as counter:
            q, x = torch.empty(1, 6, 1 + side**2, 64), torch.empty(1, 1 + side**2, 384)
            out = operator(q, q, q, x, (side, side))
            for add in added.values():
                out = add(out, q, q, q, x, (side, side))
        counts.append(counter.get_total_flops())
    assert counts[0] < counts[1] <= 1.25 * counts[0]


# --- In a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("name", [name for name in ADDITIONS if "neighborhood" not in name])
@torch.no_grad()
def test_an_addition_starts_as_the_identity(kind, name):
    vit, x = build(kind), images()
    for operator in ("elu1", "focused"):
        student = linearize(vit, operator, additions=[name])
        assert torch.equal(student(x), linearize(vit, operator)(x))
        randomised(student)
        assert not torch.allclose(student(x), linearize(vit, operator)(x))


@pytest.mark.parametrize("kind", VITS)
@torch.no_grad()
def test_a_neighborhood_of_all_patches_is_softmax(kind):
    """Where the key for all other tokens is left out; with that key, copied weights mean more than without windows."""
    vit, x = randomised(build(kind, img_size=24)), images(24, 24)
    student = linearize(vit, additions=["neighborhood5"])
    error = (student(x) - vit(x)).norm()
    assert error < 0.5 * (linearize(vit)(x) - vit(x)).norm()
    for block in student.blocks:
        block.attn.on_attention.neighborhood5.far.bias.fill_(-math.inf)
    torch.testing.assert_close(student(x), vit(x))


@pytest.mark.parametrize("kind", VITS)
@torch.no_grad()
def test_pooled_with_a_cell_for_each_patch_is_softmax(kind):
    vit, x = randomised(build(kind, img_size=40)), images(40, 40)
    student = linearize(vit, "pooled", operator_kwargs={"cells": 5})
    torch.testing.assert_close(student(x), vit(x))
    assert not torch.allclose(linearize(vit, "pooled", operator_kwargs={"cells": 2})(x), vit(x))


@pytest.mark.parametrize("pair", EVERY_PAIR, ids=ids)
def test_every_pair_trains_the_same_way_twice(pair):
    """fp32 and bf16, activation checkpointing, rotary positions, grids that are no square, prefix tokens."""
    vit = build("rotary", dynamic_img_size=True)
    student = randomised(linearize(vit, pair[0], additions=pair[1]))
    again = randomised(linearize(vit, pair[0], additions=pair[1]))
    again.set_grad_checkpointing()
    assert fingerprint(student) == fingerprint(again)
    x = images(24, 48)
    for model in (student, again):
        model(x).square().sum().backward()
    for (name, p), q in zip(student.named_parameters(), again.parameters(), strict=True):
        assert p.grad.isfinite().all(), name
        assert torch.equal(p.grad, q.grad), name
    attn = student.blocks[0].attn
    assert all(p.grad.norm() > 0 for p in attn.alignment_parameters())
    new = {id(p) for p in attn.new_parameters()}
    assert {id(p) for p in attn.alignment_parameters()} == {id(p) for p in attn.qkv_parameters()} | new
    with torch.no_grad():
        narrow, wanted = student.bfloat16()(x.bfloat16()), again(x)
    assert narrow.dtype == torch.bfloat16 and (narrow - wanted).norm() < 0.2 * wanted.norm()


def test_grouped_queries_and_separate_projections():
    vit = timm.models.Eva(
        **TINY, attn_type="rope", qkv_fused=False, num_kv_heads=1, use_rot_pos_emb=True, scale_attn_inner=True
    ).eval()
    for operator, additions in EACH:
        student = randomised(linearize(vit, operator, additions=additions))
        student(images()).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("pair", EACH, ids=ids)
@torch.no_grad()
def test_exports_and_taps(pair, tmp_path):
    student = randomised(linearize(build(), pair[0], additions=pair[1], keep_softmax=[1]))
    config = {
        "backbone": {"name": VITS["prefix tokens"][0], "kwargs": {**TINY, **VITS["prefix tokens"][1]}},
        "attention": {"operator": pair[0], "kwargs": {}, "additions": list(pair[1]), "linear_blocks": [0]},
        "input": {"image_size": 32},
    }
    save(tmp_path, student.state_dict(), config)
    loaded = load(tmp_path)
    assert linear_blocks(loaded) == [0] and fingerprint(loaded) == fingerprint(student)
    with taps(loaded, ["blocks.0.heads", "norm"]) as read:
        assert torch.equal(loaded(images()), student(images()))
    assert torch.equal(read["norm"], student.forward_features(images()))
    student.set_input_size((48, 64))
    assert torch.equal(load(tmp_path, (48, 64))(images(48, 64)), student(images(48, 64)))


@torch.no_grad()
def test_an_export_holds_the_keywords_of_its_operator(tmp_path):
    vit = build()
    attention = {"operator": "focused", "kwargs": {"power": 3}, "additions": [], "linear_blocks": [0, 1]}
    backbone = {"name": VITS["prefix tokens"][0], "kwargs": {**TINY, **VITS["prefix tokens"][1]}}
    student = linearize(vit, "focused", operator_kwargs={"power": 3})
    save(tmp_path, student.state_dict(), {"backbone": backbone, "attention": attention})
    assert torch.equal(load(tmp_path)(images()), student(images()))
    assert not torch.allclose(linearize(vit, "focused")(images()), student(images()))
    for wrong, said in (
        ({"operator": "nonsense"}, "operator 'nonsense': unknown"),
        ({"operator": 7}, r"damaged, its attention\.operator is 7"),
        ({"kwargs": {"pwer": 3}}, "takes no 'pwer', but power"),
        ({"kwargs": {"power": 1e9}}, r"attention\.kwargs: power"),
        ({"kwargs": {"power": [6]}}, r"attention\.kwargs: power"),
        ({"kwargs": {"power": "6"}}, "power '6': not a number from 1 to 64"),
        ({"additions": ["convolve"]}, "addition 'convolve': unknown"),
        ({"additions": [[]]}, "unhashable"),
        ({"additions": "gate"}, r"damaged, its attention\.additions is 'gate'"),
    ):
        save(tmp_path, student.state_dict(), {"backbone": backbone, "attention": {**attention, **wrong}})
        with pytest.raises(ValueError, match=said):
            load(tmp_path)


# --- Graphs, scripts, functions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", TOGETHER, ids=ids)
@torch.no_grad()
def test_feature_extractors_scripts_and_traces(pair):
    """What torchvision, TorchScript and torch.export make of it computes the same, after a save as well."""
    student, x = randomised(linearize(build(depth=1), pair[0], additions=pair[1])), images()
    wanted = student(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and a trace fixes the number of patches
        for script in (torch.jit.script(student), torch.jit.trace(student, x, check_trace=False)):
            torch.jit.save(script, file := io.BytesIO())
            file.seek(0)
            torch.testing.assert_close(torch.jit.load(file)(x), wanted)
        torch.testing.assert_close(torch.export.export(student, (x,)).module()(x), wanted)
    extractor = create_feature_extractor(student, {"blocks.0": "block", "head": "head"})
    torch.testing.assert_close(extractor(x)["head"], wanted)
    with pytest.raises(ValueError, match="no mask"):
        extractor(x, is_causal=True)


@pytest.mark.parametrize("pair", TOGETHER, ids=ids)
def test_a_block_compiles_without_a_graph_break(pair):
    torch.compiler.reset()  # it gives up on a function that it compiled for too many modules
    block = randomised(linearize(build(), pair[0], additions=pair[1])).blocks[0]
    x = torch.randn(2, 21, 48)
    out = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, block(x))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("pair", TOGETHER, ids=ids)
def test_gradients_of_each_sample(pair):
    student, x = randomised(linearize(build(), pair[0], additions=pair[1])).double(), images(dtype=torch.float64)
    weights = {name: p.detach() for name, p in student.named_parameters()}

    def loss(weights, image):
        return functional_call(student, weights, (image[None],)).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an operation is batched by a loop
        each = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    student(x).square().sum().backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-6, atol=1e-8)


# --- The patch grid -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local_conv3", "value_conv5", "local_dynamic", "neighborhood3", "mhla", "pooled"])
def test_the_patch_grid_is_the_images(name):
    """Whatever its shape; of a resized model, of one made to take any size, and with blocks made again in backward."""
    operator, additions = (name, ()) if name in OPERATORS else ("elu1", (name,))
    vit = build("rotary", dynamic_img_size=True)
    student = randomised(linearize(vit, operator, additions=additions))
    fixed = randomised(linearize(build("rotary"), operator, additions=additions))
    for size in ((32, 32), (16, 64), (64, 16), (24, 40)):
        fixed.set_input_size(size)
        torch.testing.assert_close(student(images(*size)), fixed(images(*size)), rtol=1e-4, atol=1e-4)
    take_any_size(fixed)
    torch.testing.assert_close(student(images(40, 24)), fixed(images(40, 24)), rtol=1e-4, atol=1e-4)

    clone = copy.deepcopy(student)
    assert clone.blocks[0].attn.grid is clone.patch_embed.patch_grid is not student.patch_embed.patch_grid
    segmenter = Segmenter(clone, build_head("linear", 48, 3, blocks=2)).eval()
    assert segmenter(images(33, 50)).shape == (2, 3, 33, 50)

    student.set_grad_checkpointing()
    alone = torch.autograd.grad(student(images(24, 40)).sum(), student.blocks[0].attn.proj.weight)[0]
    first, second = student(images(24, 40)).sum(), student(images(32, 32)).sum()
    second.backward()
    torch.testing.assert_close(torch.autograd.grad(first, student.blocks[0].attn.proj.weight)[0], alone)


@torch.no_grad()
def test_a_block_called_by_itself():
    """As stage 1 does: tokens of the teacher, so no image passed the student's patches."""
    vit = build("rotary", dynamic_img_size=True)
    student = linearize(vit, additions=["local_conv3"])
    attn, x, prefix = randomised(student.blocks[0].attn), images(24, 64), student.num_prefix_tokens
    rope = rotary_embeddings(vit, (24, 64))[0]
    with taps(vit, ["blocks.0.attn_in"]) as read:
        vit(x)
    tokens = read["blocks.0.attn_in"]
    with pytest.raises(ValueError, match="24 patches: their rows and columns are not known"):
        attn(tokens, rope=rope)
    assert attn(tokens[:, : prefix + 16]).shape[1] == prefix + 16  # as it was built
    assert attn(tokens[:, : prefix + 9]).shape[1] == prefix + 9  # a square
    note_image_size(student, (24, 64))
    alone = attn(tokens, rope=rope)
    with taps(student, ["blocks.0.mha"]) as read:
        student(x)
    torch.testing.assert_close(alone, read["blocks.0.mha"])
    note_image_size(linearize(vit), (24, 64))  # nothing there asks


@pytest.mark.parametrize("name", ["prefix tokens", "rotary"])
def test_patches_that_are_dropped_leave_no_grid(name):
    vit = build(name, patch_drop_rate=0.75)  # 4 of 16 patches are as many as a square
    with pytest.raises(ValueError, match="patch_drop: elu1 and its additions need the whole patch grid"):
        linearize(vit, additions=["value_conv3"])
    assert linearize(vit).train()(images()).isfinite().all()
    vit.patch_drop = torch.nn.Identity() if name == "prefix tokens" else None
    assert linearize(vit, additions=["value_conv3"]).train()(images()).isfinite().all()


# --- The tables -----------------------------------------------------------------------------------------------------


def test_bad_names_and_keywords_are_named():
    vit = build()
    for kwargs, said in (
        ({"operator": "cosine"}, "operator 'cosine': unknown; choose one of elu1"),
        ({"operator": "elu1", "operator_kwargs": {"power": 2}}, "operator 'elu1': takes no 'power', but no keywords"),
        (
            {"operator": "focused", "operator_kwargs": {"power": 0.5}},
            "operator 'focused': power 0.5: not a number",
        ),
        ({"operator": "mhla", "operator_kwargs": {"cells": 2.5}}, "operator 'mhla': cells 2.5: not a whole number"),
        ({"operator": "pooled", "operator_kwargs": {"window": 4}}, "operator 'pooled': window 4: not an odd number"),
        ({"operator": "pooled", "operator_kwargs": {"cells": 0}}, "'pooled': cells 0: not a number from 1 to 32"),
        ({"additions": ["gate", "wings"]}, "addition 'wings': unknown; choose among value_conv3"),
        ({"feature_map": "cosine"}, "'cosine'"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            linearize(vit, **kwargs)
        assert "\n" not in str(error.value)


@torch.no_grad()
def test_additions_go_together_in_whatever_order():
    vit = build()
    a = randomised(linearize(vit, additions=list(ADDITIONS)))
    b = randomised(linearize(vit, additions=list(ADDITIONS)[::-1]))
    assert fingerprint(a) == fingerprint(b) and torch.equal(a(images()), b(images()))
    assert torch.equal(linearize(vit, feature_map="relu")(images()), linearize(vit, "relu")(images()))


def test_wide_keeps_what_is_wide():
    assert [wide(torch.ones(1, dtype=d)).dtype for d in (torch.float16, torch.bfloat16, torch.float32)] == [
        torch.float32
    ] * 3
    assert wide(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
