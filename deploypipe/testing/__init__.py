"""Contract suites for plug-ins of other packages: what every one of a kind must do, as tests to inherit. They need pytest."""
