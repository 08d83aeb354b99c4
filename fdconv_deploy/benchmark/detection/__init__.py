"""Scoring detectors: box and mask AP on data annotated as COCO is."""
