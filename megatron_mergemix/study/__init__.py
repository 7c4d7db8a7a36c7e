"""How good the method is: fidelity to really trained models, and surfaces of known optimum."""
