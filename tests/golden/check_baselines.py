"""Does poco_vla compute what the official code of other algorithms computes? ``python check_baselines.py FOLDER``

FOLDER holds golden files (see README.md beside this file), or is one; a file's name begins with its algorithm's, such
as qc.safetensors. Our real code runs on a file's weights and draws, in float64, with the options that restore the
official behaviour where ours departs from it.

Exit status: 0 all files match, 1 one does not, 2 one is not of the format.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import baseline_dsrl
import baseline_flow_ppo
import baseline_imitation
import baseline_mpo
import baseline_q_chunking
import baseline_rlpd
import baseline_vmpo
from golden import FormatError, Golden, Numbers, Row, compare

CHECKS: dict[str, Callable[[Golden], Numbers]] = {
    "bc": baseline_imitation.bc,
    "dppo": baseline_flow_ppo.dppo,
    "dsrl": baseline_dsrl.dsrl,
    "dsrl_sac": baseline_dsrl.dsrl,
    "fql": baseline_q_chunking.fql,
    "qc": baseline_q_chunking.qc,
    "qc_fql": baseline_q_chunking.qc_fql,
    "mpo": baseline_mpo.mpo,
    "mpo_poco": baseline_mpo.mpo_poco,
    "reinflow": baseline_flow_ppo.reinflow,
    "rlpd": baseline_rlpd.rlpd,
    "rlpd_ac": baseline_rlpd.rlpd_ac,
    "vmpo": baseline_vmpo.vmpo,
}
"""Beginning of a file's name -> what reproduces it. The longest that fits counts."""


def check_file(path: Path) -> list[Row]:
    """Return the rows of one golden file.

    Raises:
        FormatError: it is none, or of no algorithm that is known.
    """
    names = [name for name in CHECKS if path.stem == name or path.stem.startswith((f"{name}_", f"{name}-", f"{name}."))]
    if not names:
        raise FormatError(f"its name begins with none of {', '.join(CHECKS)}")
    return compare(Golden(path), CHECKS[max(names, key=len)])


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: check_baselines.py FOLDER", file=sys.stderr)
        return 2
    place, status = Path(arguments[0]), 0
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files:
        print(f"{place} holds no *.safetensors", file=sys.stderr)
        return 2
    for path in files:
        print(f"{path.name}\n{'group':32} {'n':>4}  {'difference':>10}")
        try:
            rows = check_file(path)
        except FormatError as error:
            print(f"{path} is not a golden file: {error}", file=sys.stderr)
            status = 2
            continue
        print(*rows, sep="\n")
        if not all(row.ok for row in rows):
            status = max(status, 1)
    print(
        {0: f"ok: all within 1e-5 of the larger of 1 and a tensor's largest value, {len(files)} files"}.get(
            status, "FAIL"
        )
    )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
