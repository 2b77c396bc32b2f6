"""Judgement of caches and students: before (`plan`, `cost`, `fidelity`), after (`audit`, `inspection`), and of training
(`evaluation`, `compare`, `report`)."""
