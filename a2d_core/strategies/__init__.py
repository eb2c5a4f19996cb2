"""How the processes of a run share a training: accelerate configurations, by name or by path.

Each is a file for `accelerate launch`, and accelerate's own code turns it into the environment from
which the workers' `Accelerator` makes its plugin. How many processes there are is not its affair.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from a2d_core.config import STRATEGIES, UserError, check_strategy, require


def file(strategy: str) -> Path:
    """The configuration file of a strategy: one beside this module, or the user's own; raises `UserError` where it is not there."""
    named = check_strategy(strategy) in STRATEGIES
    path = Path(__file__).with_name(f"{strategy}.yaml") if named else Path(strategy).expanduser().absolute()
    require(path.is_file(), f"there is no accelerate configuration '{path}': give the path of one, or one of {', '.join(STRATEGIES)}")
    return path


def environment(path: Path, processes: int, nodes: int = 1) -> dict[str, str]:
    """What accelerate's launcher sets for a configuration and so many processes on all nodes together.

    Raises `UserError` where it contradicts what was asked for, or asks for what is not supported here.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    config = _load(path)
    kind = config.distributed_type.value
    require(
        config.num_processes in (-1, processes) and config.num_machines in (1, nodes),
        f"'{path}' is for {config.num_processes} processes on {config.num_machines} nodes, and {processes} on {nodes} were asked for: "
        "leave num_processes and num_machines out of it",
    )
    options = {"config_file": path, "num_processes": processes, "num_machines": nodes, "main_process_ip": "here", "main_process_port": 0}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "a2d_core"]))
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    made = prepare_deepspeed_cmd_env(args)[1] if kind == "DEEPSPEED" else prepare_multi_gpu_env(args)
    ours = ("OMP_NUM_THREADS", "PYTHONPATH")
    return {name: value for name, value in made.items() if name not in ours and os.environ.get(name) != value}


def _load(path: Path) -> Any:
    """The configuration, as accelerate reads it, if it is one for training on GPUs that this package knows how to save."""
    import yaml
    from accelerate.commands.config import load_config_from_file

    try:
        config = load_config_from_file(str(path))
        kind = config.distributed_type.value
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"'{path}' is not an accelerate configuration: {error}") from None
    require(kind in ("MULTI_GPU", "FSDP", "DEEPSPEED"), f"'{path}': distributed_type {kind} is none of MULTI_GPU, FSDP and DEEPSPEED")
    require(
        str(config.mixed_precision) in ("no", "None") and not config.use_cpu,
        f"'{path}': leave out mixed_precision: {config.mixed_precision} and use_cpu: {config.use_cpu}; the stage's field precision counts",
    )
    if kind == "DEEPSPEED":
        stage = config.deepspeed_config.get("zero_stage")
        require(stage in (1, 2), f"'{path}': deepspeed_config.zero_stage must be 1 or 2, not {stage}: fsdp2 shares out the weights, too")
        require(find_spec("deepspeed") is not None, f"'{path}' needs DeepSpeed: pip install 'a2d-core[deepspeed]', or take fsdp2")
    fsdp = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
    require(
        kind != "FSDP" or (str(fsdp.get("version")) == "2" and fsdp.get("cpu_ram_efficient_loading") is False),
        f"'{path}': fsdp_config must have fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false; no other FSDP is supported",
    )
    return config
