"""Cross-entropy of a linear layer: the chunked form against the plain one and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_swift.kernels.cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy


def chunked(hidden, weight, targets, scale):
    """In chunks of 8 tokens, so that a few rows make several."""
    return chunked_linear_cross_entropy(hidden, weight, targets, scale, chunk_tokens=8)


BOTH = [linear_cross_entropy, chunked]
HIDDEN, VOCABULARY = 12, 37


def inputs(tokens: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight = (torch.randn(n, HIDDEN, dtype=torch.float64, generator=generator) for n in (tokens, VOCABULARY))
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, VOCABULARY, (tokens,), generator=generator)


def run(function, hidden, weight, targets, *, scale: float = 1.0, grad_out: float = 1.0):
    """Loss and both gradients of grad_out * loss."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = torch.promote_types(hidden.dtype, torch.float32)
    loss = function(hidden, weight, targets, torch.tensor(scale, dtype=exact))
    grads = torch.autograd.grad(loss, (hidden, weight), torch.tensor(grad_out, dtype=exact))
    return loss.detach(), *grads


@pytest.mark.parametrize(("scale", "grad_out"), [(1.0, 1.0), (1 / 7, 1.0), (1.0, -2.5), (3.0, 0.5)])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 16, 43])
def test_chunked_equals_plain_in_float64(tokens, scale, grad_out):
    """With no token, less than a chunk, whole chunks and a remainder."""
    tensors = inputs(tokens)
    plain, chunked = (run(f, *tensors, scale=scale, grad_out=grad_out) for f in BOTH)
    for mine, expected in zip(chunked, plain, strict=True):
        assert mine.shape == expected.shape and mine.dtype == torch.float64
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", BOTH)
def test_by_definition(function):
    hidden, weight, targets = inputs(11)
    expected = -(hidden @ weight.t()).softmax(-1)[torch.arange(11), targets].log().sum() * 3
    torch.testing.assert_close(run(function, hidden, weight, targets, scale=3.0)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", BOTH)
def test_gradcheck(function):
    hidden, weight, targets = inputs(11)
    scale = torch.tensor(0.3, dtype=torch.float64)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: function(h, w, targets, scale) ** 2, leaves)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("function", BOTH)
def test_one_of_the_two_gradients_alone(function, which):
    tensors = inputs(11)
    expected = run(linear_cross_entropy, *tensors)[1 + which]
    tensors[which].requires_grad_()
    function(*tensors, torch.ones((), dtype=torch.float64)).backward()
    torch.testing.assert_close(tensors[which].grad, expected, rtol=1e-12, atol=1e-12)
    assert tensors[1 - which].grad is None


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1.5 * 2**-8), (torch.float16, 1.5 * 2**-11), (torch.float32, 8 * 2**-24)]
)
@pytest.mark.parametrize("function", BOTH)
def test_lower_precision_is_close_to_float64(function, dtype, tolerance):
    """Over 125 chunks too: adding their 16-bit weight gradients in 16 bits would give twice the tolerance."""
    hidden, weight, targets = inputs(1000, dtype)
    exact = run(linear_cross_entropy, hidden.double(), weight.double(), targets, scale=1 / 1000)
    mine = run(function, hidden, weight, targets, scale=1 / 1000)
    assert mine[0].dtype == torch.float32 and mine[1].dtype == mine[2].dtype == dtype
    for found, right in zip(mine, exact, strict=True):
        assert (found.double() - right).norm() < tolerance * right.norm()


@pytest.mark.parametrize("function", BOTH)
def test_fp16_does_not_underflow(function):
    """A global batch of 2^20 tokens with the loss scale: unscaled gradients of 1e-6 and less would be lost."""
    hidden, weight, targets = inputs(43, torch.float16)
    scale = 2.0**24 / 2**20
    exact = run(linear_cross_entropy, hidden.double(), weight.double(), targets, scale=scale)
    for found, right in zip(run(function, hidden, weight, targets, scale=scale), exact, strict=True):
        assert (found.double() - right).norm() < 4 * 2**-11 * right.norm()
    assert F.mse_loss(exact[1] / 2.0**24, (exact[1] / 2.0**24).half().double()) > 0  # it would have mattered


@pytest.mark.parametrize("function", BOTH)
def test_logits_far_apart(function):
    hidden, weight, targets = inputs(9)
    loss, *grads = run(function, hidden * 1e4, weight, targets)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads)


def test_chunked_never_holds_the_logits_and_no_gradient_when_evaluating():
    """Under no_grad nothing of the weight's shape is made, which for a real vocabulary is gigabytes."""
    hidden, weight, targets = inputs(43)
    weight.requires_grad_()
    sizes: list[tuple[int, ...]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != weight.data_ptr():  # views are free
                sizes.append(tuple(result.shape))
            return result

    with torch.no_grad(), Watch():
        loss = chunked(hidden, weight, targets, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(loss, run(linear_cross_entropy, hidden, weight.detach(), targets)[0])
    assert (8, VOCABULARY) in sizes and (43, VOCABULARY) not in sizes
    assert (VOCABULARY, HIDDEN) not in sizes
