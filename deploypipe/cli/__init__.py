"""The command line: parse, call one library function, show. The only place that prints or exits."""
