"""What a row tells beside its log-prob, and affine gradients, of one tile against float64: cases that every back-end keeps.

Rows are draws of the error budget (benchmarks/budget.py): mean, total and log_sum of rows that have a log-prob; what is
predicted exactly; NaN and infinities where the float64 form has them.
"""

import math

import torch

from longpo_ops.ops.tiles import MEAN, PREDICTED, TOTAL, Beside, LogitMap, TorchTiles
from tests.budget import check_budget

PLAIN = TorchTiles()
ASKED = {
    "mean": Beside(mean=True),
    "predicted": Beside(predicted=True),
    "total": Beside(total=True),
    "all": Beside(True, True, True),
}


def class_weights(vocab: int) -> torch.Tensor:
    """(V,), every third of them 0."""
    return torch.linspace(0.1, 2, vocab) * (torch.arange(vocab) % 3 != 0)


def extreme_rows(z: torch.Tensor, labels: torch.Tensor) -> None:
    """-inf among the logits, NaN, +inf, nothing finite, one that wins, a constant far from 0, and equals at the top."""
    z[0, ::3], labels[0] = -math.inf, 1
    z[1, -1] = math.nan
    z[2, 2] = math.inf
    z[3] = -math.inf
    z[4], z[4, 3] = -1e4, 1e4
    z[5] += 1e4
    z[6, 2:5] = z[6].max() + 1


def check_beside(tiles, z, labels, map: LogitMap, beside: Beside, dtype=torch.float32) -> None:
    """logps with `beside`, and gradient_ with random coefficients, on tile z, which is left as it is."""
    classes = beside.classes
    wide = map._replace(bias=None if map.bias is None else map.bias.double())
    wide_classes = None if classes is None else classes.double()
    runs = [
        (tiles, z, map, beside),
        (PLAIN, z, map, beside),
        (PLAIN, z.double(), wide, beside._replace(classes=wide_classes)),
    ]
    before = z.clone()
    ours, plain, true = (which.logps(tile, labels, m, asked) for which, tile, m, asked in runs)
    assert torch.equal(z.view(torch.int32), before.view(torch.int32))
    check_budget("logps", ours[0], plain[0], true[0], draws=True)
    scored = true[1][:, 1] >= 0
    assert torch.equal(ours[1][:, 1] >= 0, scored)
    for column, asked in ((1, True), (MEAN, beside.mean), (TOTAL, beside.total)):
        if asked:
            stats = (x[1][scored, column].clone() for x in (ours, plain, true))
            check_budget(f"column {column}", *stats, draws=True)
    if beside.predicted:
        assert torch.equal(ours[1][:, PREDICTED].double(), true[1][:, PREDICTED])
        assert (ours[1][~scored, PREDICTED] == -1).all()

    g = torch.randn(len(z), 4, generator=torch.Generator().manual_seed(3))
    copies = [z.new_full((z.shape[0], z.stride(0)), math.nan)[:, : z.shape[1]].copy_(z) for _ in range(2)]
    dz = tiles.gradient_(copies[0], labels, ours[1], g, map, dtype, classes)
    assert dz.dtype == dtype and dz.data_ptr() == copies[0].data_ptr()
    plain_dz = PLAIN.gradient_(copies[1], labels, plain[1], g, map, dtype, classes)
    true_dz = PLAIN.gradient_(z.double(), labels, true[1], g.double(), wide, torch.float64, wide_classes)
    check_budget("dz", dz, plain_dz, true_dz, draws=True)


def check_plain_member(tiles, z, labels, map: LogitMap) -> None:
    """(g, -g, 0, 0) is the gradient of g * logp; and stats of five columns serve as those of two do, bit for bit."""
    g = torch.linspace(-1, 2, len(z))
    _, stats = tiles.logps(z, labels, map)
    _, more = tiles.logps(z, labels, map, ASKED["all"])
    affine = torch.stack([g, -g, torch.zeros_like(g), torch.zeros_like(g)], 1)
    plain = tiles.gradient_(z.clone(), labels, stats, g, map, torch.float32)
    torch.testing.assert_close(tiles.gradient_(z.clone(), labels, stats, affine, map, torch.float32), plain)
    more[:, :2] = stats
    assert torch.equal(tiles.gradient_(z.clone(), labels, more, g, map, torch.float32), plain)
