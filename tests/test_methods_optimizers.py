"""Optimizers of pairs of factors, against references written from the papers in float64, one pair at a time."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from reslora_diffusion import ResLoraConfig
from reslora_diffusion.methods.optimizers import (
    FactorPair,
    LoraPro,
    LoraRite,
    RefLora,
    ScaledAdamW,
    factor_pairs,
)
from reslora_diffusion.methods.optimizers.pro import adjusted

OUT, IN, RANK, SCALING = 7, 9, 3, 0.5
KINDS = {"rite": LoraRite, "pro": LoraPro, "scaled_adamw": ScaledAdamW, "reflora": RefLora}


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def pair(A: Tensor, B: Tensor, name: str = "layer") -> FactorPair:
    return FactorPair(name, nn.Parameter(A.clone()), nn.Parameter(B.clone()), SCALING)


def quadratic(target: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A loss of the product dW = s B A whose curvature differs by direction."""
    return lambda product: ((product - target) @ x).square().mean()


def train(
    optimizer: torch.optim.Optimizer, pairs: list[FactorPair], losses: list[Callable], steps: int
) -> list[Tensor]:
    """Products s B A of all pairs after each step."""
    products = []
    for _ in range(steps):
        optimizer.zero_grad()
        sum(loss(p.scaling * p.B @ p.A) for p, loss in zip(pairs, losses, strict=True)).backward()
        optimizer.step()
        products.append(torch.stack([p.scaling * (p.B @ p.A).detach() for p in pairs]))
    return products


def problem(count: int = 2) -> tuple[list[Tensor], list[Tensor], list[Callable]]:
    As = [torch.randn(RANK, IN) for _ in range(count)]
    Bs = [torch.randn(OUT, RANK) for _ in range(count)]
    losses = [quadratic(torch.randn(OUT, IN), torch.randn(IN, 20)) for _ in range(count)]
    return As, Bs, losses


def parameters(pairs: list[FactorPair]) -> list[nn.Parameter]:
    return [factor for p in pairs for factor in (p.A, p.B)]


# ------------------------------------------------------------------------------------------------------- LoRA-RITE


def rite_reference(As, Bs, losses, steps, lr, beta1, beta2, eps, clip):
    """Algorithm 1, line by line: QR bases, transport, bias-corrected decay, clipping of all gradients together."""
    As, Bs = [A.clone() for A in As], [B.clone() for B in Bs]
    memory = [{} for _ in As]
    products = []
    for t in range(1, steps + 1):
        gradients = []
        for A, B, loss in zip(As, Bs, losses, strict=True):
            A.requires_grad_(), B.requires_grad_()
            gradients.append(torch.autograd.grad(loss(SCALING * B @ A), (A, B)))
            A.requires_grad_(False), B.requires_grad_(False)
        plain = []
        for A, B, (gA, gB) in zip(As, Bs, gradients, strict=True):
            (U_B, R_B), (U_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
            plain.append((U_B, R_B, U_A, R_A, gA.T @ torch.linalg.pinv(R_B), gB @ torch.linalg.pinv(R_A)))
        norm = sum(float(p[4].square().sum() + p[5].square().sum()) for p in plain) ** 0.5
        shrink = min(1.0, clip / norm)
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (beta1, beta2))
        for A, B, kept, (U_B, R_B, U_A, R_A, for_A, for_B) in zip(As, Bs, memory, plain, strict=True):
            moves = {}
            for key, g, U in (("A", shrink * for_A, U_B), ("B", shrink * for_B, U_A)):
                rows, r = g.shape
                M, V, U_old = kept.get(key, (torch.zeros(rows, r), torch.zeros(r, r), torch.zeros_like(U)))
                P = U.T @ U_old
                V = b2 * P @ V @ P.T + (1 - b2) * g.T @ g / rows
                values, vectors = torch.linalg.eigh((V + V.T) / 2)
                S = g @ vectors @ torch.diag(1 / (values.clamp_min(0).sqrt() + eps)) @ vectors.T
                M = b1 * M @ P.T + (1 - b1) * S
                kept[key] = (M, V, U)
                moves[key] = M
            A -= lr * (moves["A"] @ torch.linalg.pinv(R_B).T).T
            B -= lr * moves["B"] @ torch.linalg.pinv(R_A).T
        products.append(torch.stack([SCALING * B @ A for A, B in zip(As, Bs, strict=True)]))
    return products


def test_rite_is_algorithm_1() -> None:
    As, Bs, losses = problem()
    pairs = [pair(A, B) for A, B in zip(As, Bs, strict=True)]
    optimizer = LoraRite(parameters(pairs), pairs, lr=0.02, betas=(0.9, 0.99))
    got = train(optimizer, pairs, losses, 12)
    wanted = rite_reference(As, Bs, losses, 12, 0.02, 0.9, 0.99, 1e-6, 1.0)
    start = torch.stack([SCALING * B @ A for A, B in zip(As, Bs, strict=True)])
    assert (got[-1] - start).norm() > 0.1
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("escape", [False, True])
def test_rite_moves_the_product_alike_for_every_factorization(escape: bool) -> None:
    """Invariance under (R A, B R^-1) over 20 steps, which Adam lacks."""
    As, Bs, losses = problem()
    R = torch.randn(RANK, RANK) + 2 * torch.eye(RANK)
    turned = [R @ A for A in As], [B @ torch.linalg.inv(R) for B in Bs]

    def products(kind: type, As: list[Tensor], Bs: list[Tensor], **options) -> Tensor:
        pairs = [pair(A, B) for A, B in zip(As, Bs, strict=True)]
        arguments = (parameters(pairs), pairs) if kind is LoraRite else (parameters(pairs),)
        return torch.stack(train(kind(*arguments, lr=0.02, **options), pairs, losses, 20))

    ours, ours_turned = (products(LoraRite, *both, escape=escape) for both in ((As, Bs), turned))
    adam, adam_turned = (products(torch.optim.AdamW, *both) for both in ((As, Bs), turned))
    assert (ours - ours_turned).abs().max() < 1e-10
    assert (adam - adam_turned).abs().max() > 1e-2


def test_rite_leaves_A_where_B_is_zero() -> None:
    As, Bs, losses = problem(1)
    only = pair(As[0], torch.zeros_like(Bs[0]))
    optimizer = LoraRite(parameters([only]), [only], lr=0.02)
    train(optimizer, [only], losses, 1)
    assert torch.equal(only.A, As[0])
    assert only.B.abs().min() > 0
    train(optimizer, [only], losses, 2)
    assert not torch.equal(only.A, As[0])


def test_rite_skips_gradients_that_are_too_large() -> None:
    As, Bs, losses = problem(1)
    only = pair(As[0], Bs[0])
    optimizer = LoraRite(parameters([only]), [only], lr=0.02, skip_unmagnified=1e-6)
    train(optimizer, [only], losses, 1)
    assert torch.equal(only.A, As[0])
    assert torch.equal(only.B, Bs[0])


# -------------------------------------------------------------------------------------------------------- LoRA-Pro


def closest_motion(A: Tensor, B: Tensor, g: Tensor) -> Tensor:
    """min |s B H_A + s H_B A - g| over H_A [r, in], H_B [out, r], as a dense least-squares problem."""
    columns = []
    for i in range(RANK):
        for j in range(IN):
            H = torch.zeros(RANK, IN)
            H[i, j] = 1
            columns.append((SCALING * B @ H).flatten())
    for i in range(OUT):
        for j in range(RANK):
            H = torch.zeros(OUT, RANK)
            H[i, j] = 1
            columns.append((SCALING * H @ A).flatten())
    matrix = torch.stack(columns, 1)
    return (matrix @ torch.linalg.lstsq(matrix, g.flatten(), driver="gelsd").solution).reshape(OUT, IN)


def adjusted_pair(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, **options) -> tuple[Tensor, Tensor]:
    scaling = torch.full((1, 1, 1), SCALING)
    h_A, h_B = adjusted(A[None], B[None], gA[None], gB[None], scaling, 0.0, **options)
    return h_A[0], h_B[0]


def test_pro_moves_as_close_to_the_gradient_as_factors_can() -> None:
    A, B, g = torch.randn(RANK, IN), torch.randn(OUT, RANK), torch.randn(OUT, IN)
    gA, gB = SCALING * B.T @ g, SCALING * g @ A.T
    for minimal in (True, False):
        h_A, h_B = adjusted_pair(A, B, gA, gB, minimal=minimal)
        motion = SCALING * (B @ h_A + h_B @ A)
        torch.testing.assert_close(motion, closest_motion(A, B, g), rtol=1e-8, atol=1e-8)
    plain = SCALING * (B @ gA + gB @ A)
    assert (plain - g).norm() > 1.01 * (motion - g).norm()


def test_pro_stays_as_close_to_the_factors_gradients_as_it_may() -> None:
    """X is where |h_A - g_A|^2 + |h_B - g_B|^2 has no slope."""
    A, B, g = torch.randn(RANK, IN), torch.randn(OUT, RANK), torch.randn(OUT, IN)
    gA, gB = SCALING * B.T @ g, SCALING * g @ A.T
    h_A, h_B = adjusted_pair(A, B, gA, gB)
    X = torch.zeros(RANK, RANK, requires_grad=True)
    (((h_A + X @ A) - gA).square().sum() + ((h_B - B @ X) - gB).square().sum()).backward()
    assert X.grad.abs().max() < 1e-10
    free_A, free_B = adjusted_pair(A, B, gA, gB, minimal=False)
    assert (free_A - gA).norm() ** 2 + (free_B - gB).norm() ** 2 > (h_A - gA).norm() ** 2 + (h_B - gB).norm() ** 2


def test_pro_at_the_start_where_B_is_zero() -> None:
    A, g = torch.randn(RANK, IN), torch.randn(OUT, IN)
    B, gB = torch.zeros(OUT, RANK), SCALING * g @ A.T
    h_A, h_B = adjusted_pair(A, B, torch.zeros(RANK, IN), gB)
    assert torch.equal(h_A, torch.zeros(RANK, IN))
    torch.testing.assert_close(h_B, gB @ torch.linalg.inv(A @ A.T) / SCALING**2)


def pro_reference(A, B, loss, steps, lr, full):
    """LoRA-Pro by dense algebra: least squares for the motion, `lstsq` for X, Adam written out."""
    A, B = A.clone(), B.clone()
    state = {}

    def adam(name, g, t):
        m, v = state.get(name, (0.0, 0.0))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        state[name] = (m, v)
        return (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    def split(g):
        """h_A, h_B with the X that is least, from the gradient of the whole matrix."""
        P, Q = B.T @ B, A @ A.T
        h_A = torch.linalg.inv(P) @ B.T @ g / SCALING
        h_B = (torch.eye(OUT) - B @ torch.linalg.inv(P) @ B.T) @ g @ A.T @ torch.linalg.inv(Q) / SCALING
        eye = torch.eye(RANK)
        right = -(torch.linalg.inv(P) @ (SCALING * B.T @ g) @ A.T) / SCALING**2
        X = torch.linalg.solve(torch.kron(P, eye) + torch.kron(eye, Q), right.reshape(-1, 1)).reshape(RANK, RANK)
        return h_A + X @ A, h_B - B @ X

    products = []
    for t in range(1, steps + 1):
        W = (SCALING * B @ A).requires_grad_()
        (g,) = torch.autograd.grad(loss(W), W)
        if full:
            h_A, h_B = split(adam("W", closest_motion(A, B, g), t))
        else:
            h_A, h_B = split(g)
            h_A, h_B = adam("A", h_A, t), adam("B", h_B, t)
        A, B = A - lr * h_A, B - lr * h_B
        products.append(SCALING * B @ A)
    return products


@pytest.mark.parametrize("full", [False, True])
def test_pro_over_several_steps(full: bool) -> None:
    As, Bs, losses = problem(1)
    only = pair(As[0], Bs[0])
    optimizer = LoraPro(parameters([only]), [only], lr=0.01, damping=0.0, full=full, weight_decay=0.0)
    got = train(optimizer, [only], losses, 8)
    wanted = pro_reference(As[0], Bs[0], losses[0], 8, 0.01, full)
    assert (got[-1][0] - SCALING * Bs[0] @ As[0]).norm() > 0.05
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours[0], theirs, rtol=1e-8, atol=1e-8)


def test_full_pro_decays_the_product_as_adamw_decays_a_matrix() -> None:
    only = pair(torch.randn(RANK, IN), torch.randn(OUT, RANK))
    before = only.B.detach() @ only.A.detach()
    only.A.grad, only.B.grad = torch.zeros_like(only.A), torch.zeros_like(only.B)
    LoraPro(parameters([only]), [only], lr=0.1, weight_decay=0.5, full=True).step()
    torch.testing.assert_close(only.B.detach() @ only.A.detach(), (1 - 0.1 * 0.5) * before)


# --------------------------------------------------------------------------------- ScaledAdamW and RefLoRA


def test_scaled_adamw_is_peft_s_riemannian_preconditioner() -> None:
    from peft.optimizers.riemannian import create_riemannian_optimizer

    def model():
        torch.manual_seed(1)
        base = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, OUT))
        adapted = get_peft_model(base, LoraConfig(r=RANK, target_modules=["0", "1"], init_lora_weights=False))
        return adapted.to(torch.float64)

    one, other = model(), model()
    ours = ScaledAdamW([p for p in one.parameters() if p.requires_grad], factor_pairs(one), lr=0.01, damping=1e-3)
    theirs = create_riemannian_optimizer(other, torch.optim.AdamW, lr=0.01, reg=1e-3)
    x = torch.randn(5, IN)
    for _ in range(5):
        for adapted, optimizer in ((one, ours), (other, theirs)):
            optimizer.zero_grad()
            adapted(x).square().mean().backward()
            optimizer.step()
    start = dict(model().named_parameters())
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert torch.equal(a, start[name]) != a.requires_grad


def test_reflora_steps_as_balanced_factors_do() -> None:
    """A plain gradient step on the balanced factors B T, T^-1 A moves the product as the preconditioned step does."""
    A, B, g = torch.randn(RANK, IN), torch.randn(OUT, RANK), torch.randn(OUT, IN)
    U, sigma, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    balanced_B, balanced_A = U[:, :RANK] * sigma[:RANK].sqrt(), sigma[:RANK].sqrt()[:, None] * Vt[:RANK]
    torch.testing.assert_close(balanced_B.T @ balanced_B, balanced_A @ balanced_A.T)
    motion = balanced_B @ (balanced_B.T @ g) + g @ balanced_A.T @ balanced_A
    only = pair(A, B)
    only.A.grad, only.B.grad = B.T @ g, g @ A.T
    optimizer = RefLora(parameters([only]), [only], damping=0.0)
    optimizer.update(optimizer.batches())
    torch.testing.assert_close(B @ only.A.grad + only.B.grad @ A, motion, rtol=1e-8, atol=1e-8)


def preconditioned_reference(kind, A, B, loss, steps, lr, damping):
    """AdamW written out, on gradients that are multiplied as the papers say: RefLoRA's S is T T^T, where B T is the
    balanced factor that the singular value decomposition of B A gives."""
    A, B = A.clone(), B.clone()
    state, products = {}, []

    def adam(name, g, t):
        m, v = state.get(name, (0.0, 0.0))
        state[name] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        return (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    for t in range(1, steps + 1):
        W = (SCALING * B @ A).requires_grad_()
        (g,) = torch.autograd.grad(loss(W), W)
        g_A, g_B = SCALING * B.T @ g, SCALING * g @ A.T
        if kind is ScaledAdamW:
            eye = torch.eye(RANK)
            g_A = torch.linalg.solve(B.T @ B + damping * eye, g_A)
            g_B = torch.linalg.solve(A @ A.T + damping * eye, g_B.T).T
        else:
            U, sigma, _ = torch.linalg.svd(B @ A, full_matrices=False)
            T = torch.linalg.lstsq(B, U[:, :RANK] * sigma[:RANK].sqrt()).solution
            g_A, g_B = T @ T.T @ g_A, g_B @ torch.linalg.inv(T @ T.T)
        A, B = (f - lr * adam(n, g, t) for n, f, g in (("A", A, g_A), ("B", B, g_B)))
        products.append(SCALING * B @ A)
    return products


@pytest.mark.parametrize(("kind", "damping"), [(ScaledAdamW, 1e-2), (RefLora, 0.0)])
def test_preconditioned_adamw_over_several_steps(kind: type, damping: float) -> None:
    As, Bs, losses = problem(1)
    only = pair(As[0], Bs[0])
    optimizer = kind(parameters([only]), [only], lr=0.01, damping=damping, weight_decay=0.0)
    got = train(optimizer, [only], losses, 8)
    wanted = preconditioned_reference(kind, As[0], Bs[0], losses[0], 8, 0.01, damping)
    assert (got[-1][0] - SCALING * Bs[0] @ As[0]).norm() > 0.05
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours[0], theirs, rtol=1e-7, atol=1e-8)


# ------------------------------------------------------------------------------------------ what all of them share


def adapted_model(**config) -> nn.Module:
    torch.manual_seed(2)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4, 6), nn.Linear(6, 2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["3"], **config))
    for p in factor_pairs(model):
        nn.init.normal_(p.B)
    return model


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4, 4)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_convolutions_linears_and_heads_are_trained(kind: type) -> None:
    """A head that is no pair goes by AdamW, a convolution by its flattened factors."""
    model = adapted_model()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = kind(trained.values(), factor_pairs(model), lr=1e-2)
    plain = torch.optim.AdamW([nn.Parameter(before["base_model.model.3.modules_to_save.default.weight"])], lr=1e-2)
    run(model, optimizer, 1)
    for name, parameter in trained.items():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.isfinite().all()
    head = trained["base_model.model.3.modules_to_save.default.weight"]
    plain.param_groups[0]["params"][0].grad = head.grad
    plain.param_groups[0]["weight_decay"] = optimizer.param_groups[0]["weight_decay"]
    plain.param_groups[0]["eps"] = optimizer.param_groups[0]["eps"]
    plain.step()
    torch.testing.assert_close(head, plain.param_groups[0]["params"][0])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_convolution_is_its_flattened_linear_map(kind: type) -> None:
    A, B = torch.randn(RANK, 4, 3, 3), torch.randn(OUT, RANK, 1, 1)
    gA, gB = torch.randn_like(A), torch.randn_like(B)
    conv = FactorPair("conv", nn.Parameter(A.clone()), nn.Parameter(B.clone()), SCALING)
    flat = FactorPair("flat", nn.Parameter(A.flatten(1).clone()), nn.Parameter(B.flatten(1).clone()), SCALING)
    for p in (conv, flat):
        optimizer = kind(parameters([p]), [p], lr=0.01)
        for _ in range(3):
            p.A.grad, p.B.grad = gA.reshape(p.A.shape).clone(), gB.reshape(p.B.shape).clone()
            optimizer.step()
    torch.testing.assert_close(conv.A.flatten(1), flat.A)
    torch.testing.assert_close(conv.B.flatten(1), flat.B)
    assert not torch.equal(conv.A, A)


@pytest.mark.parametrize("kind", [*KINDS.values(), "pro_full"], ids=[*KINDS, "pro_full"])
def test_resumes_bit_for_bit(kind, tmp_path) -> None:
    def start():
        model = adapted_model()
        trained = [p for p in model.parameters() if p.requires_grad]
        cls, options = (LoraPro, {"full": True}) if kind == "pro_full" else (kind, {})
        return model, cls(trained, factor_pairs(model), lr=1e-2, **options)

    whole, optimizer = start()
    run(whole, optimizer, 6)
    first, optimizer = start()
    run(first, optimizer, 3)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    resumed, optimizer = start()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(resumed, optimizer, 3, first=3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_pair_without_gradients_is_left_alone(kind: type) -> None:
    """A dropped adapter neither decays nor gets NaN, and its moments wait."""
    pairs = [pair(torch.randn(RANK, IN), torch.randn(OUT, RANK), n) for n in ("kept", "dropped")]
    optimizer = kind(parameters(pairs), pairs, lr=0.01, weight_decay=0.1)
    before = pairs[1].A.detach().clone(), pairs[1].B.detach().clone()
    pairs[0].A.grad, pairs[0].B.grad = torch.randn(RANK, IN), torch.randn(OUT, RANK)
    optimizer.step()
    assert torch.equal(pairs[1].A, before[0])
    assert torch.equal(pairs[1].B, before[1])
    assert pairs[1].A not in optimizer.state


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_problem_is_named_before_anything_is_trained(kind: type) -> None:
    one = pair(torch.randn(RANK, IN), torch.randn(OUT, RANK), "one")
    half = FactorPair("half", nn.Parameter(one.A.detach().half()), nn.Parameter(one.B.detach().half()), 1.0)
    middle = pair(one.A, one.B, "joined")._replace(features=frozenset({"middle"}))
    dora = pair(one.A, one.B, "scaled")._replace(features=frozenset({"dora"}))
    missing = pair(one.A, one.B, "elsewhere")
    groups = [{"params": [one.A, *parameters([half, middle, dora])]}, {"params": [one.B], "lr": 1.0}]
    with pytest.raises(ValueError, match="LoRA\\+") as error:
        kind(groups, [one, half, middle, dora, missing])
    for part in ("one: ", "half: ", "float16", "joined: ", "`middle`", "scaled: ", "DoRA", "elsewhere: "):
        assert part in str(error.value)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shortcut", ["none", "input", "block"])
def test_trains_with_shortcuts(kind: type, shortcut: str) -> None:
    torch.manual_seed(3)
    base = nn.Sequential(*[nn.Sequential(OrderedDict(proj=nn.Linear(8, 8))) for _ in range(3)])
    model = get_peft_model(base, ResLoraConfig(r=2, lora_alpha=2, target_modules=["proj"], shortcut=shortcut))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(trained, factor_pairs(model), lr=0.02)
    x, y = torch.randn(16, 8), torch.randn(16, 8)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_middle_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapted = get_peft_model(model, ResLoraConfig(r=2, target_modules=["0", "1"], shortcut="middle"))
    with pytest.raises(ValueError, match="one lora_B multiplies the lora_A of several layers"):
        LoraRite(adapted.parameters(), factor_pairs(adapted))


def test_a_model_without_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable pair of LoRA factors named 'other'"):
        factor_pairs(adapted_model(), "other")


def test_factors_that_were_replaced_behind_its_back_are_noticed() -> None:
    """Else their successors would be trained as AdamW trains any parameter, without a word."""
    import reslora_diffusion
    from models import LLAMA_TARGETS, build, inputs

    model = build("llama")
    config = ResLoraConfig(r=2, target_modules=LLAMA_TARGETS, shortcut="block")
    adapted = reslora_diffusion.attach(model, config)
    optimizer = LoraRite(adapted.parameters(), factor_pairs(model), lr=1e-3)
    reslora_diffusion.handover(model, optimizer=optimizer)
    model(*inputs("llama"))[0].square().mean().backward()
    with pytest.raises(RuntimeError, match=r"28 pairs, such as model.layers.0.*optimizer.pairs = factor_pairs"):
        optimizer.step()
    optimizer.pairs = factor_pairs(model)
    optimizer.step()
