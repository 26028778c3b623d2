"""``resnet-fused reproduce``: rows of the papers' tables, trained plain and fused, and a report on them."""
