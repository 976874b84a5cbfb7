"""Attention on CUDA: which fused kernels are called, and with which shapes."""

import pytest
from torch.nn.attention import SDPBackend

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_fused_kernel_is_given_a_single_query(measure, precision):
    """cuDNN's, which torch prefers on Hopper, returns NaN gradients for one (NVIDIA/cudnn-frontend issue 1072)."""
    found = measure("record_attention", precision=precision)
    queries = {query[2] for _, query, _ in found["calls"]}
    assert queries == {1 + 14 * 14, 1 + 6 * 6}
    backward = [name for name, *_ in found["calls"] if name.endswith("_backward")]
    assert len(backward) == 2 * 11  # the last of 12 blocks has a single query
    assert SDPBackend.MATH.value not in found["choices"].values() and len(found["choices"]) == 2
