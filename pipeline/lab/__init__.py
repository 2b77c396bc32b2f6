"""Experiments about the library itself: speed (`bench`, `scale`), the value of a cache (`study`), known distillations
(`systems`), and teachers to distil (`teaching`)."""
