"""Run the evaluator's own network over images, in its own (TensorFlow) environment, and save what it sees.

adm_side_by_side.py calls this; it knows nothing of mixflow. It works in the current folder, where the graph lies.
"""

import importlib.util
import sys

import numpy as np


def main() -> None:
    evaluator_path, *pairs = sys.argv[1:]  # evaluator.py, then images and result by turns
    spec = importlib.util.spec_from_file_location("evaluator", evaluator_path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    evaluator = peer.Evaluator(peer.tf.Session())
    for images, result in zip(pairs[::2], pairs[1::2], strict=True):
        pool, spatial = evaluator.read_activations(images)
        of_pool, of_spatial = evaluator.compute_statistics(pool), evaluator.compute_statistics(spatial)
        np.savez(
            result,
            pool=pool,
            spatial=spatial,
            mu=of_pool.mu,
            sigma=of_pool.sigma,
            mu_s=of_spatial.mu,
            sigma_s=of_spatial.sigma,
        )
    versions = {"tensorflow": peer.tf.__version__, "numpy": np.__version__, "scipy": sys.modules["scipy"].__version__}
    print("VERSIONS", ", ".join(f"{name} {version}" for name, version in versions.items()))


if __name__ == "__main__":
    main()
