"""The modelling code that exported folders carry; its bytes decide whether such a folder is run unasked."""
