"""Published models on neighborhood attention, in Flax nnx, with loaders for the weights their authors give away.

Small enough to read: a module per model, a module per table of checkpoint keys. `gna_jax` itself never imports this.
"""

from gna_jax.models.checkpoint import count_parameters as count_parameters
from gna_jax.models.cosmos_blocks import CosmosBlock as CosmosBlock
from gna_jax.models.cosmos_blocks import CosmosSelfAttention as CosmosSelfAttention
from gna_jax.models.cosmos_model import CosmosTransformer as CosmosTransformer
from gna_jax.models.cosmos_model import cosmos as cosmos
from gna_jax.models.cosmos_presets import CosmosConfig as CosmosConfig
from gna_jax.models.cosmos_windows import predict2_schedule as predict2_schedule
from gna_jax.models.cosmos_windows import scale_rule as scale_rule
from gna_jax.models.flux_model import FluxConfig as FluxConfig
from gna_jax.models.flux_model import FluxTransformer as FluxTransformer
from gna_jax.models.flux_model import flux as flux
from gna_jax.models.hdit_model import HDiT as HDiT
from gna_jax.models.hdit_model import HDiTConfig as HDiTConfig
from gna_jax.models.hdit_model import hdit as hdit
from gna_jax.models.hunyuan_video_model import HunyuanVideoConfig as HunyuanVideoConfig
from gna_jax.models.hunyuan_video_model import HunyuanVideoTransformer as HunyuanVideoTransformer
from gna_jax.models.hunyuan_video_model import hunyuan_video as hunyuan_video
from gna_jax.models.joint import gna_joint as gna_joint
from gna_jax.models.mmdit import DoubleStreamBlock as DoubleStreamBlock
from gna_jax.models.mmdit import SingleStreamBlock as SingleStreamBlock
from gna_jax.models.nat_model import NAT as NAT
from gna_jax.models.nat_model import dinat as dinat
from gna_jax.models.nat_model import dinat_isotropic as dinat_isotropic
from gna_jax.models.nat_model import dinat_s as dinat_s
from gna_jax.models.nat_model import nat as nat
from gna_jax.models.nat_model import nat_isotropic as nat_isotropic
from gna_jax.models.nat_presets import NATConfig as NATConfig
from gna_jax.models.schedule import AttentionSchedule as AttentionSchedule
from gna_jax.models.schedule import preset_schedule as preset_schedule

__all__ = [
    "NAT",
    "AttentionSchedule",
    "CosmosBlock",
    "CosmosConfig",
    "CosmosSelfAttention",
    "CosmosTransformer",
    "DoubleStreamBlock",
    "FluxConfig",
    "FluxTransformer",
    "HDiT",
    "HDiTConfig",
    "HunyuanVideoConfig",
    "HunyuanVideoTransformer",
    "NATConfig",
    "SingleStreamBlock",
    "cosmos",
    "count_parameters",
    "dinat",
    "dinat_isotropic",
    "dinat_s",
    "flux",
    "gna_joint",
    "hdit",
    "hunyuan_video",
    "nat",
    "nat_isotropic",
    "predict2_schedule",
    "preset_schedule",
    "scale_rule",
]
