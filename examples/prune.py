"""The main job through the Python API: what ``mptk prune MODEL --sparsity 0.3 --out DIR`` does.

python examples/prune.py MODEL DIR [SPARSITY]
"""

import sys

import mptk


def main(model: str, folder: str, sparsity: float = 0.3) -> None:
    analysis = mptk.analyze(model)  # needs no weights
    for family in analysis.families:
        print(f"{family.name}: {family.size} units in each of {len(family.groups)} layers, {family.description}")
    report = mptk.prune(model, folder, mptk.Settings(sparsity=sparsity, method="wanda")).report
    print(f"sparsity {report.sparsity:.3f}, widths {[(n, f['width']) for n, f in report.families.items()]}")
    for difference in mptk.verify(folder):
        print(f"{difference.stage}: largest logit difference {difference.max_abs:.1e}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
