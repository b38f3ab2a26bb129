"""How torch computes an operator: the precision of its products, a CPU's blocks, and what backward makes again."""

import copy

import pytest
import timm
import torch
from torch.autograd import gradgradcheck
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import linearize
from models.operators import OPERATORS, Shape, build_operator, core, feature_maps
from models.operators.core import implementation

B, H, N, K = 3, 4, 57, 16
QUOTIENTS = [name for name in OPERATORS if name != "mhla"]
FUSED = ["elu1", "relu", "focused", "focused_learned", "hedgehog", "exp"]  # those without other products of their own


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Features and factors are rounded as there; a CPU takes the products of the same values in fp32."""
    for module in (core, feature_maps):
        monkeypatch.setattr(module, "rounds", lambda v: v.dtype == torch.bfloat16)


class Made(TorchDispatchMode):
    """Within it: the tensors in fp32 of at least `numel` numbers, by who made them, and the factors of products."""

    def __init__(self, numel=0):
        super().__init__()
        self.numel, self.large, self.products, self.names = numel, [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func._overloadpacket._qualified_op_name.removeprefix("aten::")
        self.names.append(name)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.numel() >= self.numel:
                self.large.append(name)
        if name == "bmm":
            self.products.append({x.dtype for x in args[:2]})
        return out


def given(name, grad=True, **new):
    """An operator with noise in its parameters, and q, k, v, x."""
    torch.manual_seed(0)
    op = build_operator(name, Shape(H * K, H, K, 1))
    with torch.no_grad():
        for p in op.parameters():
            p.add_(0.1 * torch.randn_like(p)).copy_(p.bfloat16())
    args = [torch.randn(*size).bfloat16() for size in [(B, H, N, K)] * 3 + [(B, N, H * K)]]
    return op.to(**new), [x.to(**new).requires_grad_(grad) for x in args]


def outcome(name, dtype, how="torch", device="cpu"):
    """Output, dq, dk, dv and the gradients of the parameters."""
    op, args = given(name, dtype=dtype, device=device)
    with implementation(how):
        out = op(*args, (7, 8))
    dy = torch.randn(B, N, H, K, generator=torch.Generator().manual_seed(1)).bfloat16().to(device, dtype)
    return [out, *torch.autograd.grad(out, [*args[:3], *op.parameters()], dy.transpose(1, 2))]


def errors(ours, truth):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(ours, truth, strict=True)]


@pytest.mark.parametrize("name", OPERATORS)
def test_precision(name):
    """Relative errors, forward and backward: a rounding of inputs and outputs, whatever the number of tokens."""
    truth = outcome(name, torch.float64, "reference" if name in QUOTIENTS else "torch")
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float16, 6e-4), (torch.float32, 4e-6)):
        assert max(errors(outcome(name, dtype), truth)) < bound, dtype


@pytest.mark.parametrize("name", QUOTIENTS)
def test_precision_with_features_in_bf16(name, as_on_a_gpu):
    """And of features, state and upstream gradient, as the kernels do."""
    ours, truth = outcome(name, torch.bfloat16), outcome(name, torch.float64, "reference")
    assert ours[0].dtype == torch.bfloat16
    assert max(errors(ours, truth)) < 1e-2
    with torch.no_grad():
        op, args = given(name, dtype=torch.bfloat16)
        assert torch.equal(op(*args, (7, 8)), ours[0])
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(*args, (7, 8))
    assert errors([compiled], truth[:1])[0] < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", QUOTIENTS)
def test_precision_on_a_gpu(name):
    truth = outcome(name, torch.float64, "reference", "cuda")
    for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.float32, 1e-5)):
        assert max(errors(outcome(name, dtype, device="cuda"), truth)) < bound, dtype


@pytest.mark.parametrize("name", ["elu1", "relu", "focused", "hedgehog", "exp"])
def test_features_in_bf16_have_derivatives_of_each_sample_and_second_ones(name, as_on_a_gpu):
    op, (q, k, v, x) = given(name, dtype=torch.bfloat16)

    def loss(q, k, v):
        return op(q, k, v, x, (0, 0)).float().square().sum()

    whole = torch.autograd.grad(loss(q, k, v), (q, k, v), create_graph=True)
    each = vmap(grad(lambda q, k, v: loss(q[None], k[None], v[None])))(q, k, v)
    assert torch.equal(each, whole[0])
    ours = torch.autograd.grad(sum(x.float().square().sum() for x in whole), (q, k, v))
    op, exact = op.double(), [x.detach().double().requires_grad_() for x in (q, k, v)]
    first = torch.autograd.grad(op(*exact, x, (0, 0)).square().sum(), exact, create_graph=True)
    assert max(errors(ours, torch.autograd.grad(sum(x.square().sum() for x in first), exact))) < 0.1


@pytest.mark.parametrize("name", QUOTIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_nothing(name, dtype, monkeypatch):
    whole = outcome(name, dtype)
    for heads in (1, 3, 5):
        monkeypatch.setattr(core, "BLOCK", heads * N * K * 4 // torch.get_num_threads())
        assert all(map(torch.equal, outcome(name, dtype), whole))


@pytest.mark.parametrize("name", ["elu1", "hedgehog"])
def test_second_derivatives_by_blocks(name, monkeypatch):
    monkeypatch.setattr(core, "BLOCK", 1)
    op = build_operator(name, Shape(8, 2, 4)).double()
    args = [torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert gradgradcheck(lambda *a: op(*a, a[0], (0, 0)), args)


@pytest.mark.parametrize("name", FUSED)
def test_a_cpu_makes_no_whole_copies_in_fp32(name, monkeypatch):
    monkeypatch.setattr(core, "BLOCK", N * K * 4 // torch.get_num_threads())
    op, args = given(name, dtype=torch.bfloat16)
    with Made(B * H * N * K) as made:
        op(*args, (0, 0)).sum().backward()
    assert not made.large


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_a_gpu_makes_no_whole_copies_in_fp32_for_its_products(name):
    """On a GPU without the kernels, by shapes alone; what is elementwise keeps fp32 unless bf16 is as exact."""
    with torch._subclasses.FakeTensorMode(), torch.device("cuda"):
        q, k, v = (torch.empty(B, H, N, K, dtype=torch.bfloat16) for _ in range(3))
        op = build_operator(name, Shape(H * K, H, K, 1))
        with Made(B * H * N * K) as made, implementation("torch"):
            out = op(q, k, v, q, (0, 0))
    assert out.dtype == torch.bfloat16 and out.is_cuda
    assert made.products and all(factors == {torch.bfloat16} for factors in made.products)
    assert "bmm" not in made.large or name == "hedgehog"  # whose map is a product
    assert not made.large or name not in ("elu1", "relu")


@pytest.mark.parametrize("name", FUSED)
def test_backward_on_a_gpu_has_no_products_in_fp32(name, as_on_a_gpu):
    op, args = given(name, device="meta", dtype=torch.bfloat16)
    with Made() as made:
        op(*args, (0, 0)).sum().backward()
    assert len(made.products) >= 7 and all(factors == {torch.bfloat16} for factors in made.products)


@pytest.mark.parametrize(("name", "maps"), [("elu1", "elu"), ("hedgehog", "_softmax")])
def test_checkpointing_makes_features_three_times_and_no_third_output(name, maps):
    """Forward, its recomputation, and features once more in backward; of products forward's 3 twice and backward's 4.

    Hedgehog has 2 more in each forward, and 6 in backward, by its matrices.
    """
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=0
    )
    counts = []
    for checkpointing in (False, True):
        student = copy.deepcopy(linearize(vit, name))
        student.set_grad_checkpointing(checkpointing)
        with Made() as made:
            student(torch.rand(2, 3, 32, 32)).sum().backward()
        counts.append((made.names.count(maps), len(made.products)))
    wanted = {"elu1": [(4, 7), (6, 10)], "hedgehog": [(8, 15), (12, 20)]}
    assert counts == wanted[name]
