from gemma._train import step as step
