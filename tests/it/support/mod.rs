//! Real servers for the tests: started on free ports, ended by id when the test process ends.
