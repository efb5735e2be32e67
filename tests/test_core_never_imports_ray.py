"""The core is free of Ray: it can be read, tested and used without a cluster."""

import subprocess
import sys

CORE = (
    "recipe corpus tokens encoder objective predict metrics files ragged answer local evaluation progress supervise "
    "inputs inputs.find inputs.rows inputs.units inputs.job score.predictions "
    "memory.snapshot memory.index memory.hits memory.shard memory.write memory.defaults train.loop train.mining "
    "evaluation.compare evaluation.held_out evaluation.predictions evaluation.tune report"
)


def test_importing_the_core_does_not_import_ray() -> None:
    imports = "; ".join(f"import raexmc_ray.{module}" for module in CORE.split())
    script = f"{imports}; import sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_task_that_tokenises_does_not_import_transformers() -> None:
    script = "import raexmc_ray.train.tokens, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_importing_the_package_is_light() -> None:
    script = "import raexmc_ray, sys; sys.exit(bool({'ray', 'torch', 'faiss', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
