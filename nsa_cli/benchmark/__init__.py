"""`nsa bench`: sparse attention beside dense, in one process, on this machine; right before fast."""

from nsa_cli.benchmark.options import GROUPS, BenchOptions
from nsa_cli.benchmark.report import BenchReport, Crossover, Figures, Gate, Row, load_report
from nsa_cli.benchmark.run import run_bench

__all__ = ["GROUPS", "BenchOptions", "BenchReport", "Crossover", "Figures", "Gate", "Row", "load_report", "run_bench"]
