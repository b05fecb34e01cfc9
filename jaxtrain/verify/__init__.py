"""Is our model the one that transformers makes of the same folder? The gate for every family and every checkpoint."""

from jaxtrain.verify.compare import Report, compare, verify
from jaxtrain.verify.printed import print_report
from jaxtrain.verify.subject import Subject, load_subject

__all__ = ["Report", "Subject", "compare", "load_subject", "print_report", "verify"]
