"""Verifies that our model of a checkpoint computes the same as that of transformers. Every family must pass."""

from jaxtrain.verify.compare import Report, compare, verify
from jaxtrain.verify.printed import print_report
from jaxtrain.verify.subject import Subject, load_subject

__all__ = ["Report", "Subject", "compare", "load_subject", "print_report", "verify"]
