"""Measurements of whole nets: ``resnet-fused bench``."""
