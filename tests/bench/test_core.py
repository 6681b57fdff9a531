import torch

from h3lm.bench.core import chunked_retention


def test_the_peer_retention_is_its_definition() -> None:
    q, k, v = (torch.randn(2, 3, 512, 16, dtype=torch.float64) for _ in range(3))
    t = torch.arange(512)
    ago = t[:, None] - t
    decay = (1 - 2.0 ** (-5 - torch.arange(3).double()))[:, None, None]
    weights = torch.where(ago >= 0, decay ** ago.clamp(min=0), 0.0)
    expected = ((q @ k.mT / 4) * weights) @ v
    torch.testing.assert_close(chunked_retention(q, k, v), expected, rtol=1e-5, atol=1e-5)
