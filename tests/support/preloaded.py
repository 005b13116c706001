"""What the processes of `ranks` share: a process that has imported all that they would, and computed nothing."""

import gc

import cv2  # noqa: F401
import diffusers.models.autoencoders.autoencoder_kl_wan  # noqa: F401
import diffusers.models.transformers.transformer_wan  # noqa: F401
import pytest  # noqa: F401
import torch._dynamo
import torch._dynamo.testing
import torch.distributed
import transformers.models.umt5.modeling_umt5  # noqa: F401

import tests.support.ranks
import tests.support.small_convolutions  # noqa: F401
import wan.cli
import wan.clip_sampler
import wan.commands.continuous
import wan.commands.generate
import wan.commands.job
import wan.continuation
import wan.pipeline
import wan.upscaling
import wan.video2video  # noqa: F401

torch._dynamo.list_backends()  # imports them
gc.collect()
gc.freeze()  # a collection in a process would copy all the memory that it shares with this one
