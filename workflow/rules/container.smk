# The image that jobs run in with `--sdm apptainer`; without it they run in the environment that snakemake runs in.
import os

from snakemake.settings.types import DeploymentMethod


container: settings.image


# Apptainer's --cleanenv keeps the submitting shell's environment out. These have to come in all the same: which image it
# is, the GPUs and the number that Slurm gave the job (where no cgroup hides the other GPUs, nothing else does), and what
# downloads need. OMP_NUM_THREADS differs between jobs: profiles/apptainer.
passed = [
    "CUDA_VISIBLE_DEVICES",
    "SLURM_JOB_ID",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
]
os.environ.update(
    {f"APPTAINERENV_{name}": os.environ[name] for name in passed if name in os.environ},
    APPTAINERENV_MIXFLOW_IMAGE_DIGEST=settings.image,
)

if DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method:
    try:
        mixflow_config.check_image(settings.image)
    except UserError as error:
        raise user_error(error) from None
    # Runs in the container before each job, in place of Snakemake's own prefix, which it repeats.
    shell.prefix(
        "set -euo pipefail; "
        "python -c 'import sys; from importlib.util import find_spec;"
        ' sys.exit(not (find_spec("torch") and find_spec("mixflow")))'
        "' 2>/dev/null"
        " || {{ echo \"mixflow: image: '$MIXFLOW_IMAGE_DIGEST' is not an image of mixflow: take one that 'make image' has"
        ' built (docs/container.md)" >&2; exit 2; }}; '
    )
