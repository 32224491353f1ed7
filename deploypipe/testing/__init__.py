"""What plug-ins of other packages must do: contracts of backends as functions, of runners as tests to inherit."""
