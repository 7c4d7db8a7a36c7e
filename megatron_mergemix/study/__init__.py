"""How good the method itself is: what its parts are judged on."""
